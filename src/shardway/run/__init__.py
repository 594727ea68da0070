"""Executing plans: threads that move bytes, staging and publishing."""
