"""Whether two checkouts give the same runs, bit for bit."""
