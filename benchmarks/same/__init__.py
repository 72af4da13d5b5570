"""Checks whether two checkouts give bitwise identical runs."""
