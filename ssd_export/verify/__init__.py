"""Proofs that a bundle does what it claims, from operator to image."""
