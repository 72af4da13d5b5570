"""Results of configs on held-out tasks, over several seeds."""
