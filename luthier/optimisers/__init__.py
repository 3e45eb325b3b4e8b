"""Optimisers by name."""
