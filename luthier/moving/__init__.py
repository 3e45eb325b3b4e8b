"""Moves: a delta of one base brought to another, in the weights or while decoding. One file a method or family, found by name."""
