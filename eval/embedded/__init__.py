"""Small scorers that ship with the project, and how they were made: see CARD.md."""
