"""Bases: loading, roles, fingerprints and hardware; where the parts of each model family are."""
