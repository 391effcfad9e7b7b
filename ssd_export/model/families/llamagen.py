"""The LlamaGen family: names of tensors as published, configuration, classes or captions, grid,
guidance, and the published models in numbers.

The published files are two, the transformer (c2i_B_384.pt, t2i_XL_stage2_512.pt) and the image
tokenizer (vq_ds16_c2i.pt), without a config.json; the one beside them says what no tensor's shape
tells:
    {"model_type": "llamagen", "gpt_model": "GPT-B", "image_size": 384}
or n_head in place of gpt_model. Everything else is read from the shapes and, where the file says it
too, compared: num_classes, cls_token_num, rope_base (10,000), norm_eps (1e-5). class_names, a list,
lets a class be asked for by its name.

Queries and keys of an image token are turned by its grid row (the first half of a head's pairs) and
column (the other half), pairs being neighboring numbers; here the two numbers of a pair stand half
a head apart, as rotate() has them, so rows of wq and wk are reordered on the way in. The published
table of rotations is 0 for the condition, cosine included: its queries and keys become zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ssd_export.config import EMBED_TOKENS, Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.model.conditions import CaptionEncoder, ClassEncoder
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.families.family import Family, Layout, Part, Shapes
from ssd_export.model.families.vq_16 import FROM_BLOCKS, VQ_16, vq_config_from_shapes
from ssd_export.model.prompt import Prompt
from ssd_export.os_errors import os_error
from ssd_export.sampling import Sampling
from ssd_export.typed_json import MAX_BYTES

NAME, TITLE = "llamagen", "LlamaGen"
CONFIG = "config.json"
IMAGE_TOKENIZER = "decoder of vq_ds16_*.pt"
MAX_CLASS_NAME = 200  # characters
ROWS_PER_IMAGE = 2
CAPTION_TOKENS, CAPTION_DIM = 120, 2048  # Flan-T5 XL
# Of each published transformer: layers, heads, width.
GPT_MODELS = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}
QKV = re.compile(r"language_model\.layers\.(\d+)\.self_attn\.qkv_proj\.weight")
FROM_PUBLISHED = [
    (re.compile(r"^tok_embeddings\."), "generation_embeddings."),
    (re.compile(r"^output\."), "generation_head.vision_head."),
    (re.compile(r"^cls_embedding\.embedding_table\.weight$"), EMBED_TOKENS),
    (re.compile(r"^cls_embedding\.uncond_embedding$"), EMBED_TOKENS),
    (re.compile(r"^cls_embedding\.cap_proj\."), "caption_projection."),
    (re.compile(r"^norm\."), "language_model.norm."),
    (re.compile(r"^layers\.(\d+)\."), r"language_model.layers.\1."),
    (re.compile(r"\.attention_norm\."), ".input_layernorm."),
    (re.compile(r"\.ffn_norm\."), ".post_attention_layernorm."),
    (re.compile(r"\.attention\.wqkv\."), ".self_attn.qkv_proj."),
    (re.compile(r"\.attention\.wo\."), ".self_attn.o_proj."),
    (re.compile(r"\.feed_forward\.w1\."), ".mlp.gate_proj."),
    (re.compile(r"\.feed_forward\.w2\."), ".mlp.down_proj."),
    (re.compile(r"\.feed_forward\.w3\."), ".mlp.up_proj."),
    (re.compile(r"^(encoder|decoder|quantize|quant_conv|post_quant_conv)\."), r"vqmodel.\1."),
    *FROM_BLOCKS,
]


def canonical_name(stored: str) -> str:
    """The canonical name of a published tensor; q, k and v are one until `parts`."""
    for pattern, replacement in FROM_PUBLISHED:
        stored = pattern.sub(replacement, stored)
    return stored


def parts(config: ModelConfig, shapes: Shapes) -> dict[str, Part]:
    """q, k and v of every layer as rows of the one matrix that is stored."""
    query, kv = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    found = {}
    for name in shapes:
        if QKV.fullmatch(name):
            start = 0
            for part, rows in (("q", query), ("k", kv), ("v", kv)):
                pairs_of = config.head_dim if part in "qk" else 0
                own = name.replace("qkv_proj", f"{part}_proj")
                found[own] = Part(name, range(start, start + rows), pairs_of)
                start += rows
    return found


def read_config(file: ConfigFile, shapes: Shapes) -> ModelConfig:
    """ModelConfig from the shapes and what config.json adds to them."""
    layers = len([name for name in shapes if QKV.fullmatch(name)])
    tokens = _shape(file, shapes, "generation_embeddings.weight")
    hidden = tokens[1]
    num_heads = _num_heads(file, layers, hidden)
    head_dim = hidden // num_heads
    if hidden % num_heads or head_dim % 4:
        raise file.wrong("n_head", num_heads, f"heads of a multiple of 4 of width {hidden}")
    qkv = _shape(file, shapes, "language_model.layers.0.self_attn.qkv_proj.weight")[0]
    num_kv_heads = (qkv - hidden) // (2 * head_dim)
    if num_kv_heads < 1 or hidden + 2 * num_kv_heads * head_dim != qkv or num_heads % num_kv_heads:
        raise file.wrong("n_head", num_heads, f"what divides wqkv of {qkv} rows into heads")
    grid = _grid(file, shapes)
    condition = _shape(file, shapes, EMBED_TOKENS)
    projection = shapes.get("caption_projection.fc1.weight")
    caption_dim = projection[1] if projection else 0
    has_null = bool(caption_dim) or _num_classes(file, condition[0]) < condition[0]
    place = condition[0] if caption_dim else 1
    file.require("cls_token_num", place, place)
    return ModelConfig(
        vocab_size=condition[0],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_shape(file, shapes, "language_model.layers.0.mlp.gate_proj.weight")[0],
        rope_theta=file.number("rope_base", 10_000.0),
        rms_norm_eps=file.number("norm_eps", 1e-5),
        max_positions=place + grid.num_tokens,
        codebook_size=tokens[0],
        codebook_dim=_shape(file, shapes, "vqmodel.quantize.embedding.weight")[1],
        vq=vq_config_from_shapes(file.path, shapes, TITLE, IMAGE_TOKENIZER),
        family=NAME,
        grid=grid,
        rows_per_image=ROWS_PER_IMAGE if has_null else 1,
        rope_axes=2,
        has_aligner=False,
        caption_dim=caption_dim,
    )


def _num_heads(file: ConfigFile, layers: int, hidden: int) -> int:
    name = file.values.get("gpt_model")
    if name is None:
        if file.values.get("n_head") is None:
            known = [
                key
                for key, (depth, _, width) in GPT_MODELS.items()
                if (depth, width) == (layers, hidden)
            ]
            fix = f'"gpt_model": "{known[0]}"' if known else '"n_head": 16, or as many as it has'
            raise UserError(
                f"{file.path} says neither gpt_model nor n_head, and the weights do not tell how"
                f" many heads they have: add {fix}"
            )
        return file.count("n_head", 1)
    if name not in GPT_MODELS:
        raise file.wrong("gpt_model", name, " or ".join(GPT_MODELS))
    depth, heads, width = GPT_MODELS[name]
    if (depth, width) != (layers, hidden):
        raise file.wrong(
            "gpt_model", name, f"one of {layers} layers of width {hidden}, as the weights are"
        )
    return file.count("n_head", heads)


def _grid(file: ConfigFile, shapes: Shapes) -> Grid:
    """The grid that config.json says, unless a stored table of rotations says another."""
    if file.values.get("image_size") is None:
        raise UserError(
            f'{file.path} has no image_size, and the weights do not tell it: add "image_size": 256'
            " (16 x 16 tokens), 384 or 512, as the name of the weights says"
        )
    pixels = file.count("image_size", 256)
    per_token = vq_config_from_shapes(file.path, shapes, TITLE, IMAGE_TOKENIZER).pixels_per_token
    file.require("downsample_size", per_token, per_token)
    if pixels % per_token:
        raise file.wrong("image_size", pixels, f"a multiple of the {per_token} pixels of a token")
    grid = Grid(pixels // per_token, pixels // per_token)
    rotations, condition = shapes.get("freqs_cis"), _shape(file, shapes, EMBED_TOKENS)
    place = condition[0] if "caption_projection.fc1.weight" in shapes else 1
    if rotations is not None and rotations[0] != place + grid.num_tokens:
        raise UserError(
            f"{file.path}: image_size {pixels} is a grid of {grid} tokens, and the weights were"
            f" trained on {rotations[0] - place} (freqs_cis): write the image_size that they have"
        )
    named = _size_in_a_name(file.path.parent)
    if named is not None and named != pixels:
        raise UserError(
            f"{file.path}: image_size is {pixels}, and the weights beside it are named for {named}:"
            f' write "image_size": {named}, or give the weights of {pixels}'
        )
    return grid


def _size_in_a_name(folder: Path) -> int | None:
    """The image size that a published name of weights ends in (c2i_B_384.pt)."""
    for path in sorted(folder.glob("*2i_*.pt")):
        found = re.fullmatch(r"[ct]2i_.*_(\d{3})\.pt", path.name)
        if found:
            return int(found[1])
    return None


def _num_classes(file: ConfigFile, rows: int) -> int:
    """Classes of a table: the row after the last is that of no class, if there is one."""
    num_classes = file.count("num_classes", max(rows - 1, 1))
    if num_classes not in (rows - 1, rows):
        raise file.wrong(
            "num_classes",
            num_classes,
            f"{rows - 1}, or {rows} without guidance, as the weights have",
        )
    return num_classes


def _shape(file: ConfigFile, shapes: Shapes, name: str) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(
            f"{file.path.parent} lacks the tensor {name}, a matrix: give a complete {TITLE}"
            " checkpoint, transformer and image tokenizer (vq_ds16_*.pt) in one folder"
        )
    return shape


def class_names(path: Path) -> list[str]:
    """class_names of a config.json; none where it says none. Raises: UserError."""
    try:
        values = json.loads(read_file(path, MAX_BYTES))
    except OSError as error:
        raise os_error(error, "read", path) from None
    except ValueError:
        raise UserError(f"{path} is not JSON: copy it again from where it came") from None
    names = values.get("class_names", []) if isinstance(values, dict) else []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_CLASS_NAME
        for name in names
    ):
        raise UserError(f"{path}: class_names is no list of names: write a name for each class")
    return names


def prompt_encoder(
    file: Callable[[str], Path], config: ModelConfig
) -> ClassEncoder | CaptionEncoder:
    """The encoder of classes, or of captions' embeddings."""
    if config.caption_dim:
        return CaptionEncoder(config.vocab_size, config.caption_dim)
    num_classes = config.vocab_size - (config.rows_per_image == ROWS_PER_IMAGE)
    names = class_names(file(CONFIG))
    if len(names) not in (0, num_classes):
        raise UserError(
            f"{file(CONFIG)}: class_names has {len(names)} names, and the weights have"
            f" {num_classes} classes: write a name for each, or none"
        )
    numbers = {name.lower(): number for number, name in enumerate(names)}
    return ClassEncoder(num_classes, config.rows_per_image == ROWS_PER_IMAGE, numbers)


def example_prompts(config: ModelConfig, count: int) -> list[Prompt]:
    """Classes spread over the list; or random embeddings of captions, the same each time."""
    if config.caption_dim:
        rng = np.random.default_rng(0)
        lengths = [8 + 5 * (index % 4) for index in range(count)]
        shapes = [(min(length, config.vocab_size), config.caption_dim) for length in lengths]
        return [0.1 * rng.standard_normal(shape, np.float32) for shape in shapes]
    num_classes = config.vocab_size - (config.rows_per_image == ROWS_PER_IMAGE)
    return [str(index * num_classes // count) for index in range(count)]


def prompt_slots(config: ModelConfig) -> int:
    """Slots for the longest condition."""
    return config.max_positions - config.grid.num_tokens


def _published(gpt_model: str, side: int, is_caption: bool = False) -> ModelConfig:
    layers, heads, hidden = GPT_MODELS[gpt_model]
    inner = int(8 * hidden / 3)
    return ModelConfig(
        vocab_size=CAPTION_TOKENS if is_caption else 1001,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner + -inner % 256,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        max_positions=(CAPTION_TOKENS if is_caption else 1) + side * side,
        codebook_size=16_384,
        codebook_dim=8,
        vq=VQ_16,
        family=NAME,
        grid=Grid(side, side),
        rows_per_image=ROWS_PER_IMAGE,
        rope_axes=2,
        has_aligner=False,
        caption_dim=CAPTION_DIM if is_caption else 0,
    )


PUBLISHED: Mapping[str, ModelConfig] = {
    f"llamagen-c2i-{size.lower()}-{16 * side}": _published(f"GPT-{size}", side)
    for size in ("B", "L", "XL", "XXL", "3B")
    for side in (16, 24)
} | {f"llamagen-t2i-xl-{16 * side}": _published("GPT-XL", side, True) for side in (16, 32)}

LLAMAGEN = Family(
    name=NAME,
    title=TITLE,
    example="a folder with c2i_B_384.pt, vq_ds16_c2i.pt and a config.json",
    layouts=(Layout("published", NAME, canonical_name, read_config, parts),),
    published=PUBLISHED,
    look_alikes=(),
    stand_ins=lambda file: {},
    left_out=("vqmodel.encoder.", "vqmodel.quant_conv.", "freqs_cis"),
    derived=r"^freqs_cis$|^vqmodel\.quantize\.codebook_used$",
    prompt_files=(),
    encoder=prompt_encoder,
    sampling=Sampling(cfg_scale=4.0, temperature=1.0),
    example_prompts=example_prompts,
    prompt_slots=prompt_slots,
    takes_classes=lambda config: not config.caption_dim,
    reads_text=lambda config: False,
)
