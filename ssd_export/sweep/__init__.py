"""Policies and budgets compared on the same prompts and random numbers."""
