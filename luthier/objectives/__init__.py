"""Objectives: from log-probabilities to a loss, as a sum and a count."""
