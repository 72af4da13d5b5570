"""Replay and datasets of recorded transitions, for off-policy and offline learning."""
