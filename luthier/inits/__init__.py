"""Inits: other starts for a form than its own."""
