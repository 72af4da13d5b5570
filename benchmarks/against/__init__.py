"""Comparison with other libraries on the same tasks, network and settings."""
