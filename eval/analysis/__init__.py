"""Run folders as numbers: means, intervals, tables."""
