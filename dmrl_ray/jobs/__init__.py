"""What a job is, and the workers and learners that do it, without Ray."""
