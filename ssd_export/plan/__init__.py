"""Plans the memory and disk of every stage, before any work."""
