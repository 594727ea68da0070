"""A corpus of malformed files: the generators of every one, inside of checkpoints that are sound otherwise."""
