"""Generates images from a bundle; needs neither torch nor transformers."""
