"""Rounds of experience and updates, with evaluation and checkpoints."""
