"""transformers' Llama in torch.

python -m benchmarks.peers.transformers_peer CHECKPOINT NUM_IMAGES NUM_THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count

import torch
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.peers import shape
from benchmarks.peers.protocol import serve


def open_model(checkpoint: str, num_images: int, num_threads: int) -> Callable[[], object]:
    """A decode step of two rows an image, on a cache of the common context."""
    torch.set_num_threads(num_threads)
    rows = 2 * num_images
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    past = torch.from_numpy(
        shape.random_rows(rows, shape.NUM_HEADS, shape.CONTEXT, shape.HEAD_DIM).copy()
    )
    for layer in range(model.config.num_hidden_layers):
        cache.update(past.clone(), past.clone(), layer)
    inputs = torch.from_numpy(shape.random_rows(rows, 1, shape.HIDDEN_SIZE).copy())
    positions = count(shape.CONTEXT)

    @torch.inference_mode()
    def take() -> None:
        position = torch.full((rows, 1), next(positions))
        model(inputs_embeds=inputs, past_key_values=cache, use_cache=True, position_ids=position)

    return take


if __name__ == "__main__":
    serve(lambda: open_model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
