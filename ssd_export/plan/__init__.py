"""What every stage will take of memory and disk, before any work."""
