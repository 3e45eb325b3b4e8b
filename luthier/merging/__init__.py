"""Merges: one tensor of every model in, one tensor out. One file a method or family, found by name."""
