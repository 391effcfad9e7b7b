"""The demo model's tokenizer: a byte-level BPE over scene captions with Janus' special tokens."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ssd_export.demo.scenes import random_scene

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<|User|>",
    "<|Assistant|>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
)
VOCAB_SIZE = 384


def train_tokenizer() -> Tokenizer:
    """A tokenizer whose merges make one token of every caption word; the same on every machine.

    All 256 bytes are in the vocabulary, so any text has an encoding, with or without merges.
    """
    rng = np.random.default_rng(0)
    captions = [f": {random_scene(rng).caption}\n\n:" for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
