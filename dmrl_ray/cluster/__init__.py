"""Workers and learners on Ray."""
