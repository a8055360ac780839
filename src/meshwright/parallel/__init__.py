"""Applies a Plan to a live module: one file per axis, and `apply.py`, which fixes the order."""
