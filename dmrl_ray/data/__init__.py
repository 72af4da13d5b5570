"""Recorded and replayed steps, for learning from what was not just collected."""
