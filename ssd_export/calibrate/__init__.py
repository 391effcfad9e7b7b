"""Measures attention heads on images that the model draws itself, and makes a head map of it."""
