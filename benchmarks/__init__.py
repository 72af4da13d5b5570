"""Benchmarks of speed and learning; each prints one line of figures per measurement."""
