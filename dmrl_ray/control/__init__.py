"""The meta-controller: stages, the training loop, commits, and what the screen shows."""
