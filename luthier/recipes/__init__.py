"""One plan a paper: data, not code."""
