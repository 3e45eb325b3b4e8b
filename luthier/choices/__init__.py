"""Choices: which of the base's own parameters move, and when."""
