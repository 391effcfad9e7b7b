"""Checkpoints, the decoder, the image decoder, prompts, and families/, a file for each family of
models.

`families` and `prompt` need no torch.
"""
