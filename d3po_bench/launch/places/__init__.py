"""Where runs are made: a file for each place. `registry.part` finds them by name."""
