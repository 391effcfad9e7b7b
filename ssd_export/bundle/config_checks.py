"""Checks of a bundle's numbers beyond their types: their ranges, and that they fit each other.

A bundle may come from anywhere. What passes here cannot make a runner divide by zero, allocate
without bound or read outside the bundle's files; what is wrong is named by its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssd_export.bundle.config import EXPORT_AGAIN, LEAST_DECODER_PSNR, BundleConfig
from ssd_export.bundle.graphs import (
    INT8_DECODER,
    image_decoder_spec,
    promised_graphs,
    window_graphs,
)
from ssd_export.bundle.manifest import Files
from ssd_export.config import MAX_GRID_SIDE, Grid, ModelConfig, VQConfig
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.policy.table import MAX_LOOKAHEAD, HeadGroup, PolicyTable
from ssd_export.sampling import Sampling
from ssd_export.typed_json import wrong_value

# Far above every published model, so that loops and allocations over them end.
MAX_LAYERS = 1024  # the deepest have about 130
MAX_HEADS = 1024  # the widest have about 130
MAX_HEAD_DIM = 1024  # 256 in the widest
MAX_WIDTH = 1 << 18  # of hidden layers, channels and the codebook's vectors: 53,248 in the widest
MAX_ENTRIES = 1 << 24  # of vocabulary and codebook: 256,000 and 262,144 in the largest
MAX_POSITIONS = 1 << 24  # ten millions in the longest
MAX_RES_BLOCKS = 64  # residual blocks of a level: 2 or 3
MAX_LEVELS = 10  # resolutions of the image decoder: 5
MAX_PIXELS = 1 << 26  # of an image: 8192 x 8192
MAX_PSNR = 1000.0  # dB; float64 has no more
MAX_TEXT = 1000  # characters of a name, or of a note to the user

Fault = tuple[str, Any, str]  # place, the value found, what is expected


def check_config(config: BundleConfig, source: str) -> None:
    """Returns if every value is in range and they fit together.

    Raises: UserError that begins with `source`, for the first that does not.
    """
    for place, found, expected in _faults(config):
        raise wrong_value(source, place, expected, found, EXPORT_AGAIN)
    try:
        config.policy.validate()
        Sampling(config.generation.cfg_scale, config.generation.temperature)
    except UserError as error:
        raise UserError(f"{source}: {error}; {EXPORT_AGAIN}") from None
    for place, found, expected in _graph_faults(config):
        raise wrong_value(source, place, expected, found, EXPORT_AGAIN)


def check_files(config: BundleConfig, files: Files, bundle: str) -> None:
    """Returns if the manifest has every file that the config speaks of, large enough.

    Raises: UserError.
    """
    table = config.text_embeddings
    for name in (table.file, *(f"onnx/{name}.onnx" for name in config.graphs)):
        if name not in files:
            raise UserError(f"bundle {bundle} has no {name}; {EXPORT_AGAIN}")
    size = table.shape[0] * table.shape[1] * DTYPES[table.dtype].num_bytes
    if table.offset + size > files[table.file].bytes:
        raise UserError(
            f"bundle {bundle}: the text embeddings end at byte {table.offset + size} and"
            f" {table.file} has {files[table.file].bytes}; {EXPORT_AGAIN}"
        )


def _faults(config: BundleConfig) -> Iterator[Fault]:
    """Every value out of range. Later ones are computed from earlier ones: the first counts."""
    yield from _model_faults(config.model)
    yield from _policy_faults(config.policy, config.model)
    yield from _text_faults(config)
    model, table, precision = config.model, config.text_embeddings, config.precision
    if not model.num_layers <= config.layers_of_the_model <= MAX_LAYERS:
        wanted = f"{model.num_layers} (the layers here) to {MAX_LAYERS}"
        yield "layers_of_the_model", config.layers_of_the_model, wanted
    if table.dtype != config.dtype:
        yield "text_embeddings.dtype", table.dtype, f"the bundle's dtype {config.dtype}"
    shape = (model.vocab_size, model.condition_dim)
    if table.shape != shape:
        yield "text_embeddings.shape", table.shape, f"vocab_size x condition_dim, {list(shape)}"
    if table.offset < 0:
        yield "text_embeddings.offset", table.offset, "0 or more"
    if precision.quantized_bytes < 0:
        yield "precision.quantized_bytes", precision.quantized_bytes, "0 or more"
    for name, block in {"block": precision.block, **precision.other_blocks}.items():
        if block is not None and not 1 <= block <= MAX_WIDTH:
            yield f"precision: the block of {name}", block, f"1 to {MAX_WIDTH}"
    if config.int8_decoder is not None:
        psnr, count = config.int8_decoder.psnr, config.int8_decoder.num_samples
        if not LEAST_DECODER_PSNR <= psnr <= MAX_PSNR:
            yield "int8_decoder.psnr", psnr, f"{LEAST_DECODER_PSNR:g} to {MAX_PSNR:g} dB"
        if not 0 <= count <= MAX_ENTRIES:
            yield "int8_decoder.num_samples", count, f"0 to {MAX_ENTRIES}"


def _model_faults(model: ModelConfig) -> Iterator[Fault]:
    limits = {
        "vocab_size": MAX_ENTRIES,
        "hidden_size": MAX_WIDTH,
        "num_layers": MAX_LAYERS,
        "num_heads": MAX_HEADS,
        "num_kv_heads": MAX_HEADS,
        "head_dim": MAX_HEAD_DIM,
        "intermediate_size": MAX_WIDTH,
        "max_positions": MAX_POSITIONS,
        "codebook_size": MAX_ENTRIES,
        "codebook_dim": MAX_WIDTH,
    }
    yield from _counts(model, limits, "model")
    if model.num_heads % model.num_kv_heads:
        wanted = f"a divisor of num_heads {model.num_heads}"
        yield "model.num_kv_heads", model.num_kv_heads, wanted
    if model.rope_axes not in (1, 2):
        yield "model.rope_axes", model.rope_axes, "1, or 2 for positions on a grid"
    if model.head_dim % (2 * model.rope_axes):
        wanted = f"a multiple of {2 * model.rope_axes}, for RoPE turns pairs"
        yield "model.head_dim", model.head_dim, wanted
    if not 0 <= model.caption_dim <= MAX_WIDTH:
        yield "model.caption_dim", model.caption_dim, f"0 to {MAX_WIDTH}"
    if not 1 <= model.rope_theta <= 1e12:
        yield "model.rope_theta", model.rope_theta, "1 to 1e12"
    if not 0 < model.rms_norm_eps < 1:
        yield "model.rms_norm_eps", model.rms_norm_eps, "more than 0 and less than 1"
    if model.rows_per_image not in (1, 2):
        yield "model.rows_per_image", model.rows_per_image, "1, or 2 with guidance"
    yield from _counts(model.grid, dict.fromkeys(("height", "width"), MAX_GRID_SIDE), "model.grid")
    yield from _decoder_faults(model.vq)
    if model.image_height * model.image_width > MAX_PIXELS:
        size = [model.image_height, model.image_width]
        yield "model.grid and model.vq: the image's size", size, f"at most {MAX_PIXELS} pixels"


def _decoder_faults(vq: VQConfig) -> Iterator[Fault]:
    limits = {
        "latent_channels": MAX_WIDTH,
        "base_channels": MAX_WIDTH,
        "num_res_blocks": MAX_RES_BLOCKS,
        "out_channels": MAX_WIDTH,
    }
    yield from _counts(vq, limits, "model.vq")
    levels = len(vq.channel_multipliers)
    if not 1 <= levels <= MAX_LEVELS:
        yield "model.vq.channel_multipliers", levels, f"a list of 1 to {MAX_LEVELS}"
    for index, multiplier in enumerate(vq.channel_multipliers):
        if not 1 <= multiplier <= MAX_WIDTH // vq.base_channels:
            place = f"model.vq.channel_multipliers[{index}]"
            yield place, multiplier, f"1 to {MAX_WIDTH // vq.base_channels}"


def _policy_faults(table: PolicyTable, model: ModelConfig) -> Iterator[Fault]:
    if table.grid != model.grid:
        yield "policy.grid", str(table.grid), f"the model's {model.grid}"
    most = model.max_positions - model.grid.num_tokens
    if not 1 <= table.prompt_slots <= most:
        yield "policy.prompt_slots", table.prompt_slots, f"1 to {most}, max_positions less an image"
    if not 0 < table.budget <= 1:
        yield "policy.budget", table.budget, "more than 0, and at most 1"
    if table.lookahead is not None and not 2 <= table.lookahead <= MAX_LOOKAHEAD:
        yield "policy.lookahead", table.lookahead, f"2 to {MAX_LOOKAHEAD}"
    if len(table.layers) != model.num_layers:
        yield "policy.layers", len(table.layers), f"the model's {model.num_layers} layers"
    for layer, groups in enumerate(table.layers):
        place = f"policy.layers[{layer}]"
        heads = [group.num_heads for group in groups]
        if min(heads, default=0) < 1 or sum(heads) != model.num_kv_heads:
            yield f"{place}: heads of the groups", heads, f"{model.num_kv_heads} in all"
        for index, group in enumerate(groups):
            yield from _group_faults(group, table.full_slots, model.grid, f"{place}[{index}]")


def _group_faults(group: HeadGroup, every: int, grid: Grid, place: str) -> Iterator[Fault]:
    """Faults of one head group. every: prompt slots and image tokens, the most that a head can
    fill.
    """
    rule, columns = group.rule, (1 << grid.width) - 1
    for name, found, least, most in (
        ("num_slots", group.num_slots, 1, every),
        ("evict_every", group.evict_every, 1, grid.num_tokens),
        ("rule.num_sinks", rule.num_sinks, -1, every),
        ("rule.num_recent", rule.num_recent, 0, every),
        ("rule.pinned_columns", rule.pinned_columns, 0, columns),
    ):
        if not least <= found <= most:
            yield f"{place}.{name}", found, f"{least} to {most}"


def _text_faults(config: BundleConfig) -> Iterator[Fault]:
    """Text that is shown to a user: one line, without escape sequences of a terminal."""
    texts = {
        "tool_version": config.tool_version,
        "model_name": config.model_name,
        "model.family": config.model.family,
        "model.prompt_template": config.model.prompt_template,
        "model_revision": config.model_revision or "",
        "target": config.target or "",
        "policy.name": config.policy.name,
        **{f"policy.notes[{i}]": note for i, note in enumerate(config.policy.notes)},
    }
    for place, text in texts.items():
        if not text.isprintable() or len(text) > MAX_TEXT:
            yield place, text, f"one line of at most {MAX_TEXT} printable characters"
    fingerprint = config.model_fingerprint
    if not (fingerprint.isalnum() and fingerprint.isascii() and len(fingerprint) <= MAX_TEXT):
        yield "model_fingerprint", fingerprint, "hexadecimal digits"


def _graph_faults(config: BundleConfig) -> Iterator[Fault]:
    """Graphs other than those that the model and the policy promise or allow."""
    facts = config.model, config.policy, config.dtype
    promised = {spec.name: spec for spec in promised_graphs(*facts)}
    if config.int8_decoder is not None:
        promised[INT8_DECODER] = image_decoder_spec(config.model, INT8_DECODER)
    allowed = promised | {spec.name: spec for spec in window_graphs(*facts)}
    for name in sorted(promised.keys() - config.graphs.keys()):
        yield "graphs", sorted(config.graphs), f"one named {name}, which the policy needs"
    for name in sorted(config.graphs.keys() - allowed.keys()):
        yield f"graphs.{name}", name, f"one of {', '.join(allowed)}"
    for name, spec in config.graphs.items():
        yield from _difference(f"graphs.{name}", spec, allowed[name])


def _difference(place: str, found: GraphSpec, wanted: GraphSpec) -> Iterator[Fault]:
    if found.name != wanted.name:
        yield f"{place}.name", found.name, wanted.name
    for side in ("inputs", "outputs"):
        ours, theirs = getattr(found, side), getattr(wanted, side)
        for index, (one, other) in enumerate(zip(ours, theirs)):
            for field in ("name", "dtype", "shape"):
                if getattr(one, field) != getattr(other, field):
                    wanted_value = getattr(other, field)
                    yield f"{place}.{side}[{index}].{field}", getattr(one, field), f"{wanted_value}"
        if len(ours) != len(theirs):
            yield f"{place}.{side}", len(ours), f"{len(theirs)} tensors"
    if found.aliases != wanted.aliases:
        yield f"{place}.aliases", found.aliases, f"those of {len(wanted.aliases)} outputs"


def _counts(values: object, limits: dict[str, int], place: str) -> Iterator[Fault]:
    for name, most in limits.items():
        value = getattr(values, name)
        if not 1 <= value <= most:
            yield f"{place}.{name}", value, f"1 to {most}"
