"""A run is a folder: one reader, one writer, and what is known of its origin."""
