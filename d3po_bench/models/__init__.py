"""Base models: one file for each name, and the adapter they all go through."""
