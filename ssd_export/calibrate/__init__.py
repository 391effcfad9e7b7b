"""Measures attention heads on pictures that the model draws itself, and makes a head map of it."""
