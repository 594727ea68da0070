"""Saving live models out of distributed jobs without a collective. The only package that imports torch."""
