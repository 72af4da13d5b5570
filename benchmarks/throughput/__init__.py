"""The speed of real training, row by row."""
