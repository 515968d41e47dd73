"""One file for each scorer: `load(device)` gives a `types.Scorer`."""
