"""Measures of quality: scene score, loss, similarity, intervals."""
