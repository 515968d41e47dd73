"""Where runs are made: a file for each place. `registry.place` finds them by name."""
