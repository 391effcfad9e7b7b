"""Measures attention heads on images that the model generates, and makes a head map of it."""
