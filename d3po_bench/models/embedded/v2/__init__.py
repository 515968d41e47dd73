"""Version 2 of the embedded model: scenes of one to four animals at 64 px (being trained)."""
