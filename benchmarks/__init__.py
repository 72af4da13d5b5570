"""Speed and learning, measured; each benchmark prints one line of figures."""
