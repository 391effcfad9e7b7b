"""Cache policies as data; needs no torch."""
