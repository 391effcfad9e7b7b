"""Measurements as JSON files, and what they ran on."""
