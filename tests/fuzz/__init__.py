"""Fuzzing of everything that reads bytes which nobody has to trust; ``python -m tests.fuzz --help``."""
