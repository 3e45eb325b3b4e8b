"""Forms: how a delta is written down. One file a form or family, found by name."""
