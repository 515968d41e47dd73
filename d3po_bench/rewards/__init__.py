"""Rewards of one's own: a function in a file, a server, and sums of several."""
