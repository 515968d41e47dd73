"""The embedded model's weights, the recipe that made them, and its independent classifier."""
