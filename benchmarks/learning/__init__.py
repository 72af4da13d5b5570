"""What a config learns, over several seeds, on held-out tasks."""
