"""Deltas and checkpoints as a whole, tensor by tensor and out of core: sources, the writer, and what drives merges, compressions, edits and moves."""
