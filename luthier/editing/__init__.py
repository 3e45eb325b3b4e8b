"""Edits: facts and behaviours changed at chosen places of a model. One file a method or family, found by name."""
