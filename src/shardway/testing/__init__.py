"""Checks that any model family has to pass, for those who add one. Needs numpy alone."""
