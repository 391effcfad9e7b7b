"""Janus-Pro: checkpoints, the decoder, the image decoder and prompts. `prompt` needs no torch."""
