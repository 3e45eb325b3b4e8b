"""Small shared arithmetic."""
