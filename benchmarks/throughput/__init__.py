"""The speed of complete training."""
