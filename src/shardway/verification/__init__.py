"""Comparing checkpoints bit for bit, and looking into them."""
