"""Tries what of this package works on this machine."""
