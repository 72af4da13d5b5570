"""Jobs, and the workers and learners that do them, without Ray."""
