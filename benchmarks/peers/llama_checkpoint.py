"""A Llama checkpoint of the common shape, which transformers and onnxruntime-genai read.

python -m benchmarks.peers.llama_checkpoint FOLDER NUM_LAYERS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peers import shape


def write(folder: Path, num_layers: int) -> None:
    """Writes config, random weights in float32 and a tokenizer that knows no word."""
    config = LlamaConfig(
        vocab_size=shape.CODEBOOK_SIZE,
        hidden_size=shape.HIDDEN_SIZE,
        intermediate_size=shape.INTERMEDIATE_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.NUM_HEADS,
        num_key_value_heads=shape.NUM_HEADS,
        max_position_embeddings=4096,
        rms_norm_eps=shape.RMS_NORM_EPS,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {
        name: torch.from_numpy(shape.random_matrix(*value.shape, number))
        if value.dim() == 2
        else torch.ones(value.shape)
        for number, (name, value) in enumerate(model.state_dict().items())
    }
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
