"""Measures this project and writes docs/measurements; outside the wheel."""
