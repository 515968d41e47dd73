"""One file for each objective: which prompts, whose score, which sign."""
