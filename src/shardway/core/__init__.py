"""Boxes and tiles, dtypes, stored tensors, errors: what every other layer speaks in. Imports nothing above it."""
