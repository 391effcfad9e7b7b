"""Small random Janus-Pro checkpoints in both layouts, and transformers' own generate as the oracle.

The full 24 x 24 grid with images of 48 x 48 pixels, under half a million parameters, a second an
image. The weights are large: with the default initialization every image is one token 576 times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
WORDS = (
    "a red circle above a blue square on white, two green triangles beside the yellow star; User"
    " Assistant"
)


@dataclass(frozen=True)
class TinyJanus:
    """The numbers of a random checkpoint; equal numbers give equal weights."""

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    hidden_size: int = 64
    intermediate_size: int = 96
    codebook_size: int = 256
    channel_multipliers: tuple[int, ...] = (1, 1)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    role_tokens_added: bool = True  # are <|User|> and <|Assistant|> added tokens, or ordinary text
    seed: int = 0


def train_tokenizer(role_tokens_added: bool = True) -> Tokenizer:
    """A byte-level BPE with Janus' control tokens and, as the real one, an added token that is a
    letter.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS, WORDS + "\n\n", WORDS.title()] * 4, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.add_tokens([AddedToken("\N{SNOWMAN}", special=False, normalized=True)])
    tokenizer.add_special_tokens([IMAGE])
    tokenizer.add_tokens([AddedToken("<|ref|>", special=False, normalized=False)])
    if role_tokens_added:
        tokenizer.add_tokens(
            [AddedToken(t, special=False, normalized=False) for t in ("<|User|>", "<|Assistant|>")]
        )
    tokenizer.add_special_tokens([PAD, BEGIN_OF_IMAGE, END_OF_IMAGE])
    return tokenizer


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """transformers' view of the tokenizer, padding on the left as its Janus processor does."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens={
            "image_token": IMAGE,
            "boi_token": BEGIN_OF_IMAGE,
            "eoi_token": END_OF_IMAGE,
        },
    )


def build_model(tiny: TinyJanus) -> JanusForConditionalGeneration:
    """The random model of these numbers, float32."""
    tokenizer = train_tokenizer(tiny.role_tokens_added)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=tiny.hidden_size,
            num_hidden_layers=tiny.num_layers,
            num_attention_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_kv_heads,
            head_dim=tiny.head_dim,
            intermediate_size=tiny.intermediate_size,
            max_position_embeddings=1024,
            rms_norm_eps=tiny.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": tiny.rope_theta},
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
        ),
        vision_config=JanusVisionConfig(
            image_size=48,
            patch_size=2,
            num_image_tokens=576,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=tiny.hidden_size,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=tiny.codebook_size,
            base_channels=32,
            latent_channels=32,
            num_res_blocks=1,
            channel_multiplier=list(tiny.channel_multipliers),
            projection_dim=tiny.hidden_size,
            image_token_embed_dim=tiny.hidden_size,
        ),
        image_token_id=tokenizer.token_to_id(IMAGE),
    )
    model = JanusForConditionalGeneration(config).eval()
    _randomise(model, tiny.seed)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = (
        tokenizer.token_to_id(BOS),
        tokenizer.token_to_id(EOS),
    )
    generation.pad_token_id = tokenizer.token_to_id(PAD)
    generation.generation_kwargs = {"boi_token_id": tokenizer.token_to_id(BEGIN_OF_IMAGE)}
    generation._from_model_config = False  # or generation_kwargs is dropped when it is saved
    return model


def write_transformers_checkpoint(directory: Path, tiny: TinyJanus, sharded: bool = False) -> Path:
    """Writes the checkpoint as deepseek-community/Janus-Pro-* is laid out; returns the
    directory.
    """
    build_model(tiny).save_pretrained(directory, max_shard_size="300KB" if sharded else "1GB")
    train_tokenizer(tiny.role_tokens_added).save(str(directory / "tokenizer.json"))
    return directory


def write_original_checkpoint(directory: Path, tiny: TinyJanus, sharded: bool = False) -> Path:
    """Writes the same weights as deepseek-ai/Janus-Pro-* is laid out; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = original_weights(build_model(tiny))
    names = sorted(weights)
    shards = [names[i::3] for i in range(3)] if sharded else [names]
    files = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
    files = files if sharded else ["pytorch_model.bin"]
    for file, shard in zip(files, shards):
        torch.save({name: weights[name] for name in shard}, directory / file)
    if sharded:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(original_config(tiny), indent=2))
    train_tokenizer(tiny.role_tokens_added).save(str(directory / "tokenizer.json"))
    return directory


def original_config(tiny: TinyJanus) -> dict:
    """config.json in the form of deepseek-ai/Janus-Pro-1B."""
    hidden, codebook = tiny.hidden_size, tiny.codebook_size
    mlp = {"depth": 2, "n_embed": hidden, "projector_type": "mlp_gelu"}
    head = {"image_token_embed": hidden, "image_token_size": codebook, "n_embed": hidden}
    vision = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same"}
    return {
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**mlp, "input_dim": 1024},
        },
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**mlp, "input_dim": 8},
        },
        "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": codebook, "n_embed": 8},
        },
        "language_config": {
            "head_dim": tiny.head_dim,
            "hidden_size": hidden,
            "intermediate_size": tiny.intermediate_size,
            "max_position_embeddings": 1024,
            "model_type": "llama",
            "num_attention_heads": tiny.num_heads,
            "num_hidden_layers": tiny.num_layers,
            "num_key_value_heads": tiny.num_kv_heads,
            "rms_norm_eps": tiny.rms_norm_eps,
            "rope_theta": tiny.rope_theta,
            "vocab_size": train_tokenizer(tiny.role_tokens_added).get_vocab_size(),
        },
        "model_type": "multi_modality",
        "torch_dtype": "float32",
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": vision},
    }


def original_weights(model: JanusForConditionalGeneration) -> dict[str, Tensor]:
    """The state dict under the names of deepseek-ai/Janus-Pro-*, with some of what generation does
    not need.
    """
    renames = [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.generation_embeddings\.", "gen_embed."),
        (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
        (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
        (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
        (r"^model\.generation_head\.", "gen_head."),
        (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
        (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
        (r"^model\.vqmodel\.", "gen_vision_model."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
        (r"\.(decoder\.)up\.|\.(encoder\.)down\.", r".\1\2conv_blocks."),
        (r"(conv_blocks\.\d+)\.block\.", r"\1.res."),
    ]
    weights = {"gen_vision_model.quantize.codebook_used": torch.zeros(65536)}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("model."):  # the vision tower is left out
            weights[name] = tensor.clone()
    return weights


def oracle_tokens(
    model: JanusForConditionalGeneration,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    cfg_scale: float,
) -> tuple[Tensor, float]:
    """transformers' own greedy images.

    Returns: tokens int64 [N, 576]; the smallest gap between the best and the second logit of all
    steps, after guidance. Equal tokens can be asked for only where that gap is well above rounding
    (1e-4).
    """
    texts = [
        f"{BOS}<|User|>: {prompt.strip()}\n\n<|Assistant|>:{BEGIN_OF_IMAGE}" for prompt in prompts
    ]
    inputs = hf_tokenizer(tokenizer)(
        texts, padding=True, return_tensors="pt", add_special_tokens=False
    )
    logits: list[Tensor] = []
    hook = model.model.generation_head.register_forward_hook(
        lambda module, args, output: logits.append(output)
    )
    tokens = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        generation_mode="image",
        do_sample=False,
        guidance_scale=cfg_scale,
    )
    hook.remove()
    conditional, unconditional = torch.stack(logits).chunk(2, dim=1)
    best = (unconditional + cfg_scale * (conditional - unconditional)).topk(2).values
    return tokens, float((best[..., 0] - best[..., 1]).min())


def _randomise(model: JanusForConditionalGeneration, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.1 * noise
        elif "embed" in name or parameter.dim() == 1:
            parameter.data = noise * (0.1 if parameter.dim() == 1 else 1.0)
        else:
            parameter.data = (
                noise * GAINS.get(name.split(".")[-2], 1.0) / parameter[0].numel() ** 0.5
            )


GAINS = {"q_proj": 2.0, "k_proj": 2.0, "vision_head": 4.0, "fc1": 2.0}
