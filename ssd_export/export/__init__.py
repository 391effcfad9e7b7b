"""Exports a checkpoint to a bundle: graphs, weights, quantization."""
