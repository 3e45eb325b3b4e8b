"""Compressions: a change in, the same change in a smaller form out. One file a method or family, found by name."""
