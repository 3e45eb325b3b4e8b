"""Sampling: generation engines and verifiers."""
