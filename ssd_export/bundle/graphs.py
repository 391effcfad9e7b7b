"""Inputs and outputs of each graph: names, dtypes, shapes and which output may overwrite which
input.

This is the one place where they are made; the writer, the runners, the engine builder and the C++
library read them from here or from `ssd_config.json`.

A dimension is a number or one of these names:
    images         N, images generated at once
    rows           N or, with guidance, 2 N: conditional rows first, then unconditional ones
    prompt_tokens  T, the longest prompt of the batch
    window         W, steps of an image that one pass of decode_window takes
I is the number of image tokens of the model's grid.

decode_step (step s = 1 .. I - 1 generates token s from token s - 1):
    tokens [I, images] int32 is read at row s - 1 and written at row s; step [1] int64 comes back
    plus one; prompt_length [rows] int32; noise [grid width, images, codebook] float32 (noise.py),
    of which step s reads row s mod grid width; cfg_scale, temperature [images] float32 (temperature
    0: greedy), with top-k also top_k [images] int64 (0: every code) and, beside the contract,
    num_sorted_codes [1] int64, an input with a default (sampler.py);
    past_key_values.{layer}.{group}.{key|value|position|score} ->
    present.{layer}.{group}.{...}, aliased; with keys and values in int8 also
    {key_scale|value_scale}, float32 (cache/quantized_rows.py).
prefill: prompt embeddings -> token 0, and present.* with T slots, which the runtime copies into the
caches (R8).
evict: past_key_values.*.{position|score} of the groups that evict between steps -> present.* (R5,
R7). The
    scores, which only a score_decay below 1 changes, are not aliased: nothing orders their write
    after the ranking.
evict_*: the same for the groups that evict before the same steps, where others evict before
other ones. Either
    evict alone or those that are due: evict ranks every group whenever one is full.
decode_window (lookahead; W consecutive steps of each image, from its own step `first` on):
    window_tokens [images, window] int32: the token before that step, then drafts of those from it
    on; first [images] int64; limit [images] int64: how many of them the caches have room for before
    an eviction is due, at most W, 0 for an image that rests (first is then I, and its window_tokens
    the last token written); noise [images, window, codebook] of the steps. -> sampled [images,
    window] int32; kept [images] int64, the samples before the first wrong draft, at most limit;
    logits [rows, window, codebook]. The caches are left as single steps would leave them after the
    kept ones. Places from the limit on repeat the last one before it. Evictions between steps
    are the caller's, as for decode_step. A bundle of an earlier export has no such graph.
decode_rows (grid rows in parallel, which are not single steps' tokens; only where no head ever
    evicts or ranks by score; W places, the same of every image):
    window_tokens [images, window] int32: the token at step - 1 of each place, or what stands in for
    it; steps [window] int64: the steps of the places; noise [images, window, codebook] of them. ->
    sampled [images, window] int32; logits [rows, window, codebook]. The tokens given are written
    into the slots of their positions, whatever these held; a place attends to the slots up to its
    token's that hold one. A bundle of an earlier export has no such graph.
image_decoder: codes [images, I] -> pixels [images, height, width, 3] in 0..255, not rounded.
image_decoder_int8: the same for ONNX Runtime on the CPU, in bundles of --decoder-weights int8.
"""

from __future__ import annotations

from collections.abc import Iterator

from ssd_export.config import ModelConfig
from ssd_export.graph_spec import CacheTensor, Dimension, GraphSpec, TensorSpec
from ssd_export.policy.schedule import EvictionKind, eviction_kind, eviction_kinds
from ssd_export.policy.table import HeadGroup, PolicyTable, Rule

IMAGE_DECODER, INT8_DECODER = "image_decoder", "image_decoder_int8"
INT8_DECODER_TENSORS = f"{INT8_DECODER}.data"  # file of the tensors of that graph's forms
FUSED = "_fused"  # ends the file of a graph that uses the operators of engines/operators
MAX_SORTED_CODES = 3840  # TensorRT's TopK takes no more


def num_sorted_codes(codebook_size: int) -> int:
    """The greatest top-k below "every code" of an engine that cannot choose how many it sorts."""
    return min(codebook_size, MAX_SORTED_CODES)


def window_graphs(config: ModelConfig, table: PolicyTable, dtype: str) -> list[GraphSpec]:
    """The graphs of lookahead, which bundles of earlier exports lack."""
    makers = [decode_window_spec, *([decode_rows_spec] if keeps_rows(table) else [])]
    return [make(config, table, dtype, top_k) for make in makers for top_k in (False, True)]


def keeps_rows(table: PolicyTable) -> bool:
    """Whether grid rows can be decoded in parallel: slot and position are one in every head."""
    return not any(
        group.rule.by_score or group.can_fill(table.prompt_slots, table.grid)
        for group in table.groups()
    )


def promised_graphs(config: ModelConfig, table: PolicyTable, dtype: str) -> list[GraphSpec]:
    """Every graph that a bundle of this model and policy must have; beside them it may have
    `window_graphs`.
    """
    graphs = [
        make(config, table, dtype, top_k)
        for make in (prefill_spec, decode_step_spec)
        for top_k in (False, True)
    ]
    return [*graphs, image_decoder_spec(config), *evict_specs(config, table, dtype)]


def head_groups(table: PolicyTable) -> Iterator[tuple[int, int, HeadGroup]]:
    """(layer, group index, group) of the whole table."""
    for layer, groups in enumerate(table.layers):
        for index, group in enumerate(groups):
            yield layer, index, group


def part_names(rule: Rule, kv_dtype: str) -> list[str]:
    """The cache tensors of a group with this rule, in the order of the attention node; no score
    where none is ranked by.
    """
    scales = ["key_scale", "value_scale"] if kv_dtype == "int8" else []
    return ["key", "value", *scales, "position"] + ["score"] * rule.by_score


def cache_parts(
    group: HeadGroup, config: ModelConfig, dtype: str, num_slots: Dimension, kv_dtype: str
) -> list[tuple[str, TensorSpec]]:
    """(part, spec without a name) of a group's cache tensors."""
    slots = ("rows", group.num_heads, num_slots)
    rows = TensorSpec("", dtype if kv_dtype == "model" else kv_dtype, (*slots, config.head_dim))
    number = TensorSpec("", "float32", slots)
    specs = {"key": rows, "value": rows, "position": TensorSpec("", "int32", slots)}
    return [(part, specs.get(part, number)) for part in part_names(group.rule, kv_dtype)]


def _named(name: str, spec: TensorSpec) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)


def _sampling_inputs(
    config: ModelConfig, top_k: bool, places: tuple[Dimension, Dimension] | None = None
) -> list[TensorSpec]:
    """Inputs of the sampler. places: the first dimensions of the noise. None: a grid row of
    steps.
    """
    rows, columns = places or (config.grid.width, "images")
    inputs = [
        TensorSpec("noise", "float32", (rows, columns, config.codebook_size)),
        TensorSpec("cfg_scale", "float32", ("images",)),
        TensorSpec("temperature", "float32", ("images",)),
    ]
    return inputs + ([TensorSpec("top_k", "int64", ("images",))] if top_k else [])


def decode_step_spec(
    config: ModelConfig, table: PolicyTable, dtype: str, top_k: bool = False
) -> GraphSpec:
    """The contract of a decode step."""
    tokens = TensorSpec("tokens", "int32", (config.grid.num_tokens, "images"))
    inputs = [
        tokens,
        TensorSpec("step", "int64", (1,)),
        TensorSpec("prompt_length", "int32", ("rows",)),
    ]
    inputs += _sampling_inputs(config, top_k)
    outputs = [
        _named("present_tokens", tokens),
        TensorSpec("next_step", "int64", (1,)),
        TensorSpec("logits", "float32", ("rows", config.codebook_size)),
    ]
    aliases = {"present_tokens": "tokens"}
    _add_caches(inputs, outputs, aliases, config, table, dtype)
    return GraphSpec(
        "decode_step_top_k" if top_k else "decode_step", tuple(inputs), tuple(outputs), aliases
    )


def decode_window_spec(
    config: ModelConfig, table: PolicyTable, dtype: str, top_k: bool = False
) -> GraphSpec:
    """The contract of a pass over several steps of each image."""
    inputs = [
        TensorSpec("window_tokens", "int32", ("images", "window")),
        TensorSpec("first", "int64", ("images",)),
        TensorSpec("limit", "int64", ("images",)),
        TensorSpec("prompt_length", "int32", ("rows",)),
        *_sampling_inputs(config, top_k, ("images", "window")),
    ]
    outputs = [
        TensorSpec("sampled", "int32", ("images", "window")),
        TensorSpec("kept", "int64", ("images",)),
        TensorSpec("logits", "float32", ("rows", "window", config.codebook_size)),
    ]
    aliases: dict[str, str] = {}
    _add_caches(inputs, outputs, aliases, config, table, dtype)
    return GraphSpec(
        "decode_window_top_k" if top_k else "decode_window", tuple(inputs), tuple(outputs), aliases
    )


def decode_rows_spec(
    config: ModelConfig, table: PolicyTable, dtype: str, top_k: bool = False
) -> GraphSpec:
    """The contract of a pass over the same steps of every image, in several grid rows."""
    inputs = [
        TensorSpec("window_tokens", "int32", ("images", "window")),
        TensorSpec("steps", "int64", ("window",)),
        TensorSpec("prompt_length", "int32", ("rows",)),
        *_sampling_inputs(config, top_k, ("images", "window")),
    ]
    outputs = [
        TensorSpec("sampled", "int32", ("images", "window")),
        TensorSpec("logits", "float32", ("rows", "window", config.codebook_size)),
    ]
    aliases: dict[str, str] = {}
    _add_caches(inputs, outputs, aliases, config, table, dtype)
    return GraphSpec(
        "decode_rows_top_k" if top_k else "decode_rows", tuple(inputs), tuple(outputs), aliases
    )


def _add_caches(
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    aliases: dict[str, str],
    config: ModelConfig,
    table: PolicyTable,
    dtype: str,
) -> None:
    """Every cache tensor as an input and, in the same memory, as an output."""
    for layer, index, group in head_groups(table):
        for part, spec in cache_parts(group, config, dtype, group.num_slots, table.kv_dtype):
            cache = CacheTensor(layer, index, part)
            inputs.append(_named(cache.past, spec))
            outputs.append(_named(cache.present, spec))
            aliases[cache.present] = cache.past


def prefill_spec(
    config: ModelConfig, table: PolicyTable, dtype: str, top_k: bool = False
) -> GraphSpec:
    """The contract of the prefill."""
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("rows", "prompt_tokens", config.condition_dim)),
        TensorSpec("prompt_length", "int32", ("rows",)),
        *_sampling_inputs(config, top_k),
    ]
    outputs = [
        TensorSpec("token", "int32", ("images",)),
        TensorSpec("logits", "float32", ("rows", config.codebook_size)),
    ]
    for layer, index, group in head_groups(table):
        for part, spec in cache_parts(group, config, dtype, "prompt_tokens", table.kv_dtype):
            if part != "position":
                outputs.append(_named(CacheTensor(layer, index, part).present, spec))
    return GraphSpec("prefill_top_k" if top_k else "prefill", tuple(inputs), tuple(outputs))


def evict_specs(config: ModelConfig, table: PolicyTable, dtype: str) -> list[GraphSpec]:
    """evict and, where there are several kinds of groups (policy/schedule.py), one graph for each;
    none where none evicts between steps.
    """
    kinds = eviction_kinds(table)
    if not kinds:
        return []
    graphs = [None, *kinds] if len(kinds) > 1 else [None]
    return [evict_spec(config, table, dtype, kind) for kind in graphs]


def evict_spec(
    config: ModelConfig, table: PolicyTable, dtype: str, kind: EvictionKind | None = None
) -> GraphSpec:
    """The graph that evicts in the groups of a kind, or in all that evict between steps."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    aliases: dict[str, str] = {}
    for layer, index, group in head_groups(table):
        own = eviction_kind(table, group)
        if own is None or kind not in (None, own):
            continue
        for part, spec in cache_parts(group, config, dtype, group.num_slots, table.kv_dtype):
            if part not in ("position", "score"):
                continue
            cache = CacheTensor(layer, index, part)
            inputs.append(_named(cache.past, spec))
            if part == "position":
                outputs.append(_named(cache.present, spec))
                aliases[cache.present] = cache.past
            elif table.score_decay != 1:
                outputs.append(_named(cache.present, spec))
    if inputs:
        lengths = [
            TensorSpec("step", "int64", (1,)),
            TensorSpec("prompt_length", "int32", ("rows",)),
        ]
        inputs = lengths + inputs
    return GraphSpec(
        "evict" if kind is None else kind.graph, tuple(inputs), tuple(outputs), aliases
    )


def image_decoder_spec(config: ModelConfig, name: str = IMAGE_DECODER) -> GraphSpec:
    """The contract of the image decoder, in float or in int8."""
    pixels = ("images", config.image_height, config.image_width, config.vq.out_channels)
    return GraphSpec(
        name,
        (TensorSpec("codes", "int32", ("images", config.grid.num_tokens)),),
        (TensorSpec("pixels", "float32", pixels),),
    )
