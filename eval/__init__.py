"""Scorers, evaluation, statistics and figures."""
