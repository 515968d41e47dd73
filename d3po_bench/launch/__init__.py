"""Places to run: this process, worker processes."""
