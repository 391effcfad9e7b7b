"""The Janus-Pro family: names of tensors in both published layouts, configuration, prompt template,
grid, guidance, and the published models in numbers.

Canonical names are those of the transformers layout without the leading "model.":
    language_model.{embed_tokens,norm,layers.N.*}   generation_{embeddings,aligner,head}.*
    vqmodel.{quantize.embedding,post_quant_conv,decoder.*}
Everything else in the files (understanding, text head, image encoder) is left out.

The original 7B config.json names only layers, positions and vocabulary: the rest is Llama's
defaults. The original layout says nothing about the image decoder's widths either; they are read
from the tensors' shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ssd_export.config import EMBED_TOKENS, Grid, ModelConfig, VQConfig
from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.families.family import Family, Layout, Shapes, names_of
from ssd_export.model.families.vq_16 import (
    FROM_BLOCKS,
    VQ_16,
    check_widths,
    vq_config_from_shapes,
)
from ssd_export.model.prompt import Prompt, PromptTemplate, TemplateEncoder
from ssd_export.model.rope import rope_theta
from ssd_export.sampling import Sampling
from ssd_export.typed_json import MAX_BYTES

NAME, TITLE = "janus", "Janus-Pro"
GRID = Grid(24, 24)  # image tokens row by row, from the upper left
ROWS_PER_IMAGE = 2  # the conditional row and, for classifier-free guidance, the unconditional one
BOS, PAD, BEGIN_OF_IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PROMPT = PromptTemplate(
    begin=BOS,
    end=BEGIN_OF_IMAGE,
    pad=PAD,
    roles=(USER, ASSISTANT),
    parts=(USER, ": {prompt}\n\n", ASSISTANT, ":"),
)
# Janus-1.3B was trained with its roles as words; everything else is as in Janus-Pro.
PRO_TEMPLATE, FIRST_TEMPLATE = "janus-pro", "janus"
TEMPLATES = {
    PRO_TEMPLATE: PROMPT,
    FIRST_TEMPLATE: replace(PROMPT, roles=(), parts=("User: {prompt}\n\nAssistant:",)),
}
FIRST_MODELS = ("janus-1.3b",)  # beginnings of names
NAMED = {"janus-pro": PRO_TEMPLATE, **dict.fromkeys(FIRST_MODELS, FIRST_TEMPLATE)}
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
PROMPT_SLOTS = 64  # what most prompts need
EXAMPLES = (
    "a red circle on white",
    "a blue square above a yellow ring on sand",
)  # of different length
TOKENIZER = "tokenizer.json"
TEXT_HEAD = "lm_head.weight"
FROM_ORIGINAL = [
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^gen_embed\."), "generation_embeddings."),
    (re.compile(r"^gen_aligner\.layers\.0\."), "generation_aligner.fc1."),
    (re.compile(r"^gen_aligner\.layers\.2\."), "generation_aligner.hidden_layers.0."),
    (re.compile(r"^gen_head\.output_mlp_projector\."), "generation_head.proj_out."),
    (re.compile(r"^gen_head\."), "generation_head."),
    (re.compile(r"^gen_vision_model\."), "vqmodel."),
    *FROM_BLOCKS,
]


def from_transformers(stored: str) -> str:
    """The canonical name of a tensor of transformers' layout."""
    return stored.removeprefix("model.")


def from_original(stored: str) -> str:
    """The canonical name of a tensor of the original layout."""
    for pattern, replacement in FROM_ORIGINAL:
        stored = pattern.sub(replacement, stored)
    return stored


def prompt_encoder(file: Callable[[str], Path], config: ModelConfig) -> TemplateEncoder:
    """The encoder of the model's prompt template."""
    template = TEMPLATES.get(config.prompt_template or PRO_TEMPLATE)
    if template is None:
        raise UserError(
            f"prompts are written as {config.prompt_template!r}, and this ssd-export knows"
            f" {' and '.join(TEMPLATES)}; use the version that wrote the bundle"
        )
    return TemplateEncoder.from_file(file(TOKENIZER), template, TITLE, config.vocab_size)


def find_prompt_template(folder: Path) -> tuple[str, str]:
    """(template, what tells it): the chat template beside the weights, else the model's name, else
    the tokenizer's chat template, which may be that of the language model before; else Janus-Pro's.
    """
    for name in CHAT_TEMPLATES:
        if text := _chat_template(folder / name):
            return _by_roles(text), name
    for known_as in sorted(names_of(folder)):
        for start, template in NAMED.items():
            if known_as.startswith(start):
                return template, f"the name {known_as}"
    if text := _chat_template(folder / TOKENIZER_CONFIG):
        return _by_roles(text), TOKENIZER_CONFIG
    return PRO_TEMPLATE, "nothing beside the weights says another"


def _by_roles(chat_template: str) -> str:
    return PRO_TEMPLATE if "<|" in chat_template else FIRST_TEMPLATE


def _chat_template(path: Path) -> str:
    """The chat template that a file holds, if it has roles; "" where there is none."""
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8")
        is_json = path.suffix == ".json"
        found = json.loads(text).get("chat_template", "") if is_json else text
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return found if isinstance(found, str) and "User" in found else ""


def prompt_note(config: ModelConfig, folder: Path) -> str:
    """Note on how the model's prompts are written, and what tells it."""
    name = config.prompt_template or PRO_TEMPLATE
    found, source = find_prompt_template(folder)
    where = source if found == name else "asked for"
    return f"prompts as {name}: {''.join(TEMPLATES[name].parts)!r} ({where})"


def example_prompts(config: ModelConfig, count: int) -> list[Prompt]:
    """Captions that any model of the family reads."""
    return [EXAMPLES[index % len(EXAMPLES)] for index in range(count)]


def stand_ins(file: ConfigFile) -> Mapping[str, str]:
    """The text head may stand for the text embedding, unless the file says that they differ; what
    it says of the whole model goes before what it says of the language model.
    """
    sections = [file, file.section("text_config"), file.section("language_config")]
    said = [section.values.get("tie_word_embeddings") for section in sections]
    tied = next((tied for tied in said if tied is not None), True)
    return {} if tied is False else {EMBED_TOKENS: TEXT_HEAD}


def read_transformers_config(file: ConfigFile, shapes: Shapes) -> ModelConfig:
    """ModelConfig from transformers' config.json."""
    vision, vq = file.section("vision_config"), file.section("vq_config")
    vision.require("num_image_tokens", GRID.num_tokens, GRID.num_tokens)
    vq.require("num_hidden_layers", 2, 2)
    vq.require("hidden_act", "gelu", "gelu")
    vq_config = VQConfig(
        latent_channels=vq.count("latent_channels", 256),
        base_channels=vq.count("base_channels", 128),
        channel_multipliers=vq.counts("channel_multiplier", (1, 1, 2, 2, 4)),
        num_res_blocks=vq.count("num_res_blocks", 2),
        out_channels=vq.count("out_channels", 3),
    )
    codebook = vq.count("num_embeddings", 16384), vq.count("embed_dim", 8)
    return _model_config(file, "text_config", codebook, vq_config)


def read_original_config(file: ConfigFile, shapes: Shapes) -> ModelConfig:
    """ModelConfig from the original config.json, with the defaults that it leaves out."""
    if "gen_vision_config" not in file.values:
        raise UserError(
            f"{file.path} has no gen_vision_config, so it generates no images: give a {TITLE}"
            " checkpoint"
        )
    aligner = file.section("gen_aligner_config").section("params")
    aligner.require("depth", 2, 2)
    aligner.require("projector_type", "mlp_gelu", "mlp_gelu")
    vision = file.section("gen_vision_config").section("params")
    codebook = vision.count("image_token_size", 16384), vision.count("n_embed", 8)
    vq_config = vq_config_from_shapes(file.path, shapes, TITLE, "gen_vision_model")
    return _model_config(file, "language_config", codebook, vq_config)


def _model_config(
    file: ConfigFile, section: str, codebook: tuple[int, int], vq: VQConfig
) -> ModelConfig:
    text = file.section(section)
    text.require("hidden_act", "silu", "silu")
    text.require("attention_bias", False, False)
    text.require("mlp_bias", False, False)
    hidden_size, num_heads = text.count("hidden_size", 4096), text.count("num_attention_heads", 32)
    num_kv_heads = text.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise text.wrong(
            "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads {num_heads}"
        )
    if text.values.get("head_dim") is None and hidden_size % num_heads:
        raise text.wrong(
            "num_attention_heads", num_heads, f"a divisor of hidden_size {hidden_size}"
        )
    head_dim = text.count("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise text.wrong("head_dim", head_dim, "an even number, RoPE turns pairs")
    check_widths(file.path, vq, TITLE)
    return ModelConfig(
        vocab_size=text.count("vocab_size", 32000),
        hidden_size=hidden_size,
        num_layers=text.count("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.count("intermediate_size", 11008),
        rope_theta=rope_theta(text),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_positions=text.count("max_position_embeddings", 2048),
        codebook_size=codebook[0],
        codebook_dim=codebook[1],
        vq=vq,
        family=NAME,
        grid=GRID,
        rows_per_image=ROWS_PER_IMAGE,
        prompt_template=find_prompt_template(file.path.parent)[0],
    )


def _janus_pro(
    num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        max_positions=16_384,
        codebook_size=16_384,
        codebook_dim=8,
        vq=VQ_16,
        family=NAME,
        grid=GRID,
        rows_per_image=ROWS_PER_IMAGE,
        prompt_template=PRO_TEMPLATE,
    )


JANUS = Family(
    name=NAME,
    title=TITLE,
    example="deepseek-community/Janus-Pro-1B",
    layouts=(
        Layout("transformers", "janus", from_transformers, read_transformers_config),
        Layout("original", "multi_modality", from_original, read_original_config),
    ),
    published={
        "janus-pro-1b": _janus_pro(24, 2048, 16, 5632),
        "janus-pro-7b": _janus_pro(30, 4096, 32, 11008),
    },
    look_alikes=FIRST_MODELS,
    stand_ins=stand_ins,
    left_out=("vision_model.", "aligner.", "vqmodel.encoder.", "lm_head."),
    derived=r"\.rotary_emb\.inv_freq$|^vqmodel\.quantize\.codebook_used$",
    prompt_files=(TOKENIZER,),
    encoder=prompt_encoder,
    sampling=Sampling(cfg_scale=5.0, temperature=1.0),
    example_prompts=example_prompts,
    prompt_slots=lambda config: PROMPT_SLOTS,
    prompt_templates=tuple(TEMPLATES),
    prompt_note=prompt_note,
)
