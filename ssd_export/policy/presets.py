"""Cache policies as data. The rules that every backend obeys are told here, once; elsewhere they
are cited.

A key is cached after RoPE at its true position, so the order of slots is free: nothing is shifted,
compacted or concatenated. Eviction writes -1 into an integer tensor.

R1  A head owns num_slots slots: key (after RoPE), value, position (RoPE position of the token held,
-1 =
    empty), score (float32).
R2  score = sum of the softmax probabilities the slot has received from this head since it was
written, what
    the prompt tokens gave each other in prefill included. Grouped-query attention: summed over the
    query heads of the KV head. A release ranks first and then multiplies every score of the head by
    score_decay (1: the running sum; 0: only what came since the last release). Batch rows are
    independent: the conditional and the unconditional row evict on their own.
R3  retention (float32) = +inf if the token is a protected sink (position < num_sinks; num_sinks =
-1 means
    the whole prompt), or recent (position > newest - num_recent, newest being the position of the
    token about to be written, so that num_recent - 1 of the held tokens are protected), or an image
    token in a pinned grid column ((position - prompt length) mod the grid's width is a set bit of
    pinned_columns). Otherwise score if by_score, else position.
R4  Of tokens of equal retention the one in the lower slot is released first (an arg-min from the
left).
R5  release(count): empty the slots of the count tokens of least retention. Changes position only.
R6  A new token goes to the lowest empty slot.
R7  Decode step, in order: a head of a row that has no empty slot does release(evict_every); write
    key, value, position, score = 0; attend over the non-empty slots, the new token included; add
    the probabilities to score.
R8  Prefill attends densely and causally over the prompt and writes prompt token t to slot t. The
padding of a
    prompt shorter than prompt_slots is an empty slot and is never attended. num_slots >
    prompt_slots, so the whole prompt fits; what R3 does not protect of it can be evicted later.
R9  Valid, for each head: num_sinks + max(num_recent - 1, 0) + grid height x pinned columns +
    evict_every <= num_slots (-1 read as prompt_slots), or num_slots >= prompt_slots + image tokens
    (nothing is ever evicted).

Row b writes its first image token at position prompt_length[b]. num_slots = prompt slots + image
slots, and a budget is the mean of the image slots over all KV heads of the model, buffer included,
divided by the number of image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

from ssd_export.config import Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.layout import group_equal_heads
from ssd_export.policy.table import HeadGroup, HeadOption, PolicyTable, Rule, check_group

__all__ = [
    "HeadGroup",
    "HeadOption",
    "PolicyTable",
    "Rule",
    "POLICIES",
    "HEAD_TYPE_POLICIES",
    "MAX_GROUPS",
    "DEFAULT_GROUPS",
    "check_group",
    "make_policy",
    "needs_head_map",
    "policy_from_head_options",
]

HEAD_TYPE_POLICIES = ("ssd", "ssd-row", "margin")
POLICIES = ("full", "streaming-llm", "h2o", "tova", "linear", *HEAD_TYPE_POLICIES, "ssd-auto")
MAX_GROUPS = 3
DEFAULT_GROUPS = (
    2  # each has operators of its own in every step; a third gains at small budgets (docs/heads.md)
)
Allocation = Sequence[Sequence[HeadOption | tuple[Rule, int, int]]]


def needs_head_map(name: str) -> bool:
    """Whether the policy tells heads apart (ssd-auto needs the costs of a calibrated map as
    well).
    """
    return name in HEAD_TYPE_POLICIES or name == "ssd-auto"


def make_policy(
    name: str,
    config: ModelConfig,
    *,
    budget: float,
    window: int | None = None,
    evict_every: int | None = None,
    num_recent: int | None = None,
    num_sinks: int | None = None,
    prompt_slots: int = 64,
    head_map: HeadMap | None = None,
    groups: int = MAX_GROUPS,
    allocation: Allocation | None = None,
) -> PolicyTable:
    """The valid table of a named policy, mean image slots as near below budget x image tokens as whole
    slots allow.

    Args: window (spatial heads), evict_every and num_recent (all heads, or the semantic ones where
    heads are told apart) and num_sinks replace the policy's defaults; a default that a small budget
    cannot hold shrinks and says so in notes, a number that was asked for does not. allocation: the
    option of each head, for ssd-auto.
    Raises: UserError for an unknown policy, a budget outside (0, 1] or too small, no head map where
    one is needed.
    """
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    if not 0 < budget <= 1:
        raise UserError(
            f"budget={budget} is outside (0, 1]; use 0.2 to keep a fifth of the image tokens"
        )
    if window is not None and name not in HEAD_TYPE_POLICIES:
        raise UserError(
            f"policy {name} has no window; drop --window, or use {', '.join(HEAD_TYPE_POLICIES)}"
        )
    _check_asked(evict_every=evict_every, num_recent=num_recent, num_sinks=num_sinks)
    if name == "full" or budget == 1:
        everything = HeadOption(Rule(-1, 0, False), config.grid.num_tokens, 1)
        per_head = [[everything] * config.num_kv_heads] * config.num_layers
        return policy_from_head_options(config, name, 1.0, prompt_slots, per_head)
    if name == "ssd-auto":
        if allocation is None:
            raise UserError(
                "ssd-auto needs a head map with costs; run `ssd-export calibrate`, or use "
                "--policy ssd-row"
            )
        return policy_from_head_options(
            config, name, budget, prompt_slots, allocation, groups=groups
        )
    if name in HEAD_TYPE_POLICIES:
        return _two_kinds(
            name, config, budget, window, evict_every, num_recent, num_sinks, prompt_slots, head_map
        )
    return _one_kind(name, config, budget, evict_every, num_recent, num_sinks, prompt_slots)


def policy_from_head_options(
    config: ModelConfig,
    name: str,
    budget: float,
    prompt_slots: int,
    per_head: Allocation,
    *,
    score_decay: float = 1.0,
    groups: int = MAX_GROUPS,
    notes: Sequence[str] = (),
) -> PolicyTable:
    """The valid table in which each KV head has its option; heads of a layer with equal options
    form a group.

    Args: per_head [num_layers][num_kv_heads] (rule, image slots, evict_every), in the checkpoint's
    head order.
    Raises: ValueError for another number of layers, heads or groups (a bug of the caller),
    UserError for R9.
    """
    if len(per_head) != config.num_layers or any(
        len(layer) != config.num_kv_heads for layer in per_head
    ):
        raise ValueError(
            f"options for {config.num_layers} layers x {config.num_kv_heads} KV heads wanted"
        )
    layers, head_order = [], []
    for index, options in enumerate(per_head):
        kinds, order = group_equal_heads([HeadOption(*option) for option in options])
        if len(kinds) > groups:
            raise ValueError(
                f"layer {index} has {len(kinds)} different options; at most {groups} groups fit"
            )
        layers.append(
            tuple(
                HeadGroup(kind.rule, prompt_slots + kind.image_slots, kind.evict_every, count)
                for kind, count in kinds
            )
        )
        head_order.append(order)
    return PolicyTable(
        name,
        budget,
        prompt_slots,
        score_decay,
        config.grid,
        tuple(layers),
        tuple(head_order),
        tuple(notes),
    ).validate()


def _check_asked(**numbers: int | None) -> None:
    for name, value in numbers.items():
        least = {"evict_every": 1, "num_recent": 0, "num_sinks": -1}[name]
        if value is not None and value < least:
            raise UserError(f"{name}={value} is too small; use {name} >= {least}")


def _one_kind(
    name: str,
    config: ModelConfig,
    budget: float,
    evict_every: int | None,
    num_recent: int | None,
    num_sinks: int | None,
    prompt_slots: int,
) -> PolicyTable:
    """streaming-llm, h2o, tova, linear: every head alike."""
    grid = config.grid
    slots = floor(Fraction(str(budget)) * grid.num_tokens)
    if slots < 1:
        raise UserError(
            f"budget={budget} leaves no slot for image tokens; use budget >= "
            f"{_up(1 / grid.num_tokens)}"
        )
    notes: list[str] = []
    if evict_every is None:
        evict_every = _grid_row_buffer(slots, grid.width, notes) if name == "linear" else 1
    if num_recent is None:
        wanted = {"h2o": slots // 2, "linear": 2 * grid.width}.get(name, 0)
        num_recent = _recent_guard(wanted, slots - evict_every)
        if name == "linear" and num_recent < wanted:
            notes.append(
                f"num_recent {num_recent} instead of {wanted}: {slots} image slots hold no more"
            )
    rule = Rule(
        -1 if num_sinks is None else num_sinks, num_recent, by_score=name != "streaming-llm"
    )
    per_head = [[HeadOption(rule, slots, evict_every)] * config.num_kv_heads] * config.num_layers
    return policy_from_head_options(
        config,
        name,
        budget,
        prompt_slots,
        per_head,
        notes=notes,
        score_decay=0.0 if name in ("tova", "linear") else 1.0,
    )


def _two_kinds(
    name: str,
    config: ModelConfig,
    budget: float,
    window: int | None,
    evict_every: int | None,
    num_recent: int | None,
    num_sinks: int | None,
    prompt_slots: int,
    head_map: HeadMap | None,
) -> PolicyTable:
    """ssd, ssd-row, margin: spatial heads keep a window, semantic heads what ranks highest."""
    if head_map is None:
        raise UserError(
            f"policy {name} tells heads apart and this model has no head map; run `ssd-export "
            "calibrate`, give --head-map FILE, or use --policy h2o"
        )
    semantic = head_map.for_model(config).semantic()
    grid = config.grid
    pinned = margin_columns(grid) if name == "margin" else 0
    least = grid.height * pinned.bit_count() + max((num_recent or 0) - 1, 0) + (evict_every or 1)
    notes: list[str] = []
    num_semantic = sum(map(sum, semantic))
    num_spatial = config.num_layers * config.num_kv_heads - num_semantic
    window, slots = _window_and_scored_slots(
        budget, window, num_spatial, num_semantic, least, grid, notes
    )
    if evict_every is None:
        free = slots - grid.height * pinned.bit_count()
        evict_every = (
            1 if name == "ssd" or not num_semantic else _grid_row_buffer(free, grid.width, notes)
        )
    if num_recent is None:
        num_recent = 0 if name == "margin" else _recent_guard(slots // 2, slots - evict_every)
    sinks = -1 if num_sinks is None else num_sinks
    spatial_option = HeadOption(Rule(sinks, 0, False), window, 1)
    semantic_option = HeadOption(
        Rule(sinks, num_recent, name != "margin", pinned), slots, evict_every
    )
    per_head = [
        [semantic_option if head else spatial_option for head in layer] for layer in semantic
    ]
    return policy_from_head_options(config, name, budget, prompt_slots, per_head, notes=notes)


def _window_and_scored_slots(
    budget: float,
    asked: int | None,
    num_spatial: int,
    num_semantic: int,
    least: int,
    grid: Grid,
    notes: list[str],
) -> tuple[int, int]:
    """Image slots of a spatial and of a semantic head that use up the budget over all heads.

    A window that was asked for is kept. Otherwise it is default_window, or less where the mean is small (0.7 of
    it: a window larger than a scored set serves neither kind), or more where semantic heads hold
    everything already; never too small for the token above.
    """
    usual, num_tokens = default_window(grid), grid.num_tokens
    smallest = grid.width + 1  # holds the token one grid row above while it writes one
    if asked is not None and asked < smallest:
        raise UserError(
            f"window={asked} does not hold the token one grid row above; use window >= {smallest}"
        )
    heads = num_spatial + num_semantic
    total = floor(Fraction(str(budget)) * num_tokens * heads)
    affordable = (total - num_semantic * least) // max(num_spatial, 1)
    window = min(
        asked or max(smallest, min(usual, 7 * total // (10 * heads), affordable)), num_tokens
    )
    if num_spatial * window + num_semantic * least > total:
        enough = (num_spatial * window + num_semantic * least) / (heads * num_tokens)
        raise UserError(
            f"budget={budget} is too small for window={window} on {num_spatial} of {heads} heads "
            f"and at least {least} image slots on the others; use budget >= {_up(enough)}"
            + (" or a smaller window" if window > smallest and num_spatial else "")
        )
    slots = min((total - num_spatial * window) // num_semantic, num_tokens) if num_semantic else 0
    if asked is None and num_spatial and slots in (0, num_tokens):
        window = min((total - num_semantic * slots) // num_spatial, num_tokens)
    if asked is None and num_spatial and window < usual:
        notes.append(
            f"window {window} instead of {usual}: the budget is {total // heads} slots a head"
        )
    return window, slots


def default_window(grid: Grid) -> int:
    """Image slots of a spatial head where nothing else is asked: two grid rows and two thirds."""
    return 8 * grid.width // 3


def margin_columns(grid: Grid) -> int:
    """The first column and the last two: what `margin` pins."""
    return 1 | 0b11 << grid.width - 2


def _grid_row_buffer(slots: int, width: int, notes: list[str]) -> int:
    """A grid row of slots to fill between two releases, or a divisor of it that leaves at least as
    many tokens kept.
    """
    most = max(slots // 2, 1)
    size = max(count for count in range(1, width + 1) if width % count == 0 and count <= most)
    if size < width:
        notes.append(
            f"evict_every {size} instead of {width}: {slots} image slots would be mostly buffer"
        )
    return size


def _recent_guard(wanted: int, kept: int) -> int:
    """num_recent as wanted, but at least a quarter of what a release keeps stays free to rank."""
    return min(wanted, max(kept, 0) * 3 // 4 + 1)


def _up(budget: float) -> float:
    """The budget rounded up to four digits, so that a message never names one that is too small."""
    return ceil(budget * 10_000) / 10_000
