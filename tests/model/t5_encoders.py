"""A small random T5 with its tokenizer, written as published ones are."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

WIDTH, EOS = 24, 1
WORDS = ["a", "red", "blue", "green", "circle", "square", "above", "on", "white"]


def write_t5(folder: Path, width: int = WIDTH, **config: object) -> Path:
    """Writes config.json, model.safetensors (decoder included) and tokenizer.json."""
    disable_progress_bar()
    torch.manual_seed(0)
    settings = dict(
        vocab_size=len(WORDS) + 3, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=EOS,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(T5Config(**{**settings, **config})).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def write_tokenizer(path: Path, end: bool = True) -> None:
    """Writes a tokenizer of WORDS that ends every text in </s>."""
    ids = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )
    tokenizer.enable_truncation(4)  # as published: what is cut off would go unnoticed
    tokenizer.save(str(path))
