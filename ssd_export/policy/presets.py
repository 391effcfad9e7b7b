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
    query heads of the KV head. An eviction ranks first and then multiplies every score of the head
    by score_decay (1: the running sum; 0: only what came since the last eviction). Batch rows are
    independent: the conditional and the unconditional row evict on their own.
R3  retention (float32) = +inf if the token is a protected sink (position < num_sinks; num_sinks =
-1 means
    the whole prompt), or recent (position > newest - num_recent, newest being the position of the
    token about to be written, so that num_recent - 1 of the held tokens are protected), or an image
    token in a pinned grid column ((position - prompt length) mod the grid's width is a set bit of
    pinned_columns). Otherwise score if by_score, else position.
R4  Of tokens of equal retention the one in the lower slot is evicted first (an arg-min from the
left).
R5  evict(count): empty the slots of the count tokens of least retention. Changes position only.
R6  A new token goes to the lowest empty slot.
R7  Decode step, in order: a head of a row that has no empty slot does evict(evict_every); write
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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import floor

from ssd_export.config import Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.layout import group_equal_heads
from ssd_export.policy.sizes import (
    budget_too_small,
    grid_row_buffer,
    recent_guard,
    window_and_ranked_slots,
)
from ssd_export.policy.table import (
    FULL,
    KEEP,
    HeadGroup,
    HeadOption,
    PolicyTable,
    Rule,
    check_group,
)

__all__ = [
    "HeadGroup",
    "HeadOption",
    "Heads",
    "Policy",
    "PolicyTable",
    "Rule",
    "POLICIES",
    "MAX_GROUPS",
    "DEFAULT_GROUPS",
    "check_group",
    "default_policy",
    "make_policy",
    "policy_from_head_options",
    "policy_of",
]

MAX_GROUPS = 3
DEFAULT_GROUPS = (
    2  # each adds operators to every step; a third gains at small budgets (docs/heads.md)
)
Allocation = Sequence[Sequence[HeadOption | tuple[Rule, int, int]]]
Recent = Callable[[int, Grid], int]  # of (image slots, grid): newest tokens that are protected


class Heads(Enum):
    """The way a policy gives each head its rule and size."""

    EVERYTHING = "all heads keep everything"
    ALIKE = "all heads have the policy's rule and an equal share of the budget"
    BY_TYPE = "spatial heads keep a window, semantic heads have the policy's rule"
    ALLOCATED = "each head has the option that a calibration found cheapest for it"


def no_guard(slots: int, grid: Grid) -> int:
    return 0


def half_of_the_slots(slots: int, grid: Grid) -> int:
    return slots // 2


def two_grid_rows(slots: int, grid: Grid) -> int:
    return 2 * grid.width


def no_columns(grid: Grid) -> int:
    return 0


def margin_columns(grid: Grid) -> int:
    """The first column and the last two."""
    return 1 | 0b11 << grid.width - 2


@dataclass(frozen=True)
class Policy:
    """Definition of a policy; adding one takes a row of POLICIES and one in the README's table.

    by_score: heads rank by score, else by position (R3); num_recent: R3's default of it;
    score_decay: R2; pinned_columns: R3's mask; row_buffer: an eviction frees a grid row of slots
    unless told otherwise, else one (R7); options: numbers that a user may set. Where head types are
    told apart, all of this is about semantic heads.
    """

    name: str
    heads: Heads
    by_score: bool = True
    num_recent: Recent = no_guard
    score_decay: float = 1.0
    pinned_columns: Callable[[Grid], int] = no_columns
    row_buffer: bool = False
    options: tuple[str, ...] = ("evict_every", "num_recent", "num_sinks")

    @property
    def needs_head_map(self) -> bool:
        """Whether the policy depends on a head map."""
        return self.heads in (Heads.BY_TYPE, Heads.ALLOCATED)


BY_TYPE_OPTIONS = ("window", "evict_every", "num_recent", "num_sinks")
POLICIES: dict[str, Policy] = {
    row.name: row
    for row in (
        Policy(FULL, Heads.EVERYTHING, options=()),
        Policy("ssd-auto", Heads.ALLOCATED, options=()),
        Policy(
            "ssd-row",
            Heads.BY_TYPE,
            num_recent=half_of_the_slots,
            row_buffer=True,
            options=BY_TYPE_OPTIONS,
        ),
        Policy("ssd", Heads.BY_TYPE, num_recent=half_of_the_slots, options=BY_TYPE_OPTIONS),
        Policy("streaming-llm", Heads.ALIKE, by_score=False),
        Policy("h2o", Heads.ALIKE, num_recent=half_of_the_slots),
        Policy("tova", Heads.ALIKE, score_decay=0.0),
        Policy("linear", Heads.ALIKE, num_recent=two_grid_rows, score_decay=0.0, row_buffer=True),
        Policy(
            "margin",
            Heads.BY_TYPE,
            by_score=False,
            pinned_columns=margin_columns,
            row_buffer=True,
            options=BY_TYPE_OPTIONS,
        ),
    )
}


def policy_of(name: str) -> Policy:
    """The policy of that name. Raises: UserError where there is none."""
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def default_policy(has_costs: bool, has_options: bool) -> str:
    """The policy of a model that none was asked for.

    Args: has_costs: its head map has costs to allocate by; has_options: numbers were asked for,
    which an allocation would choose itself.
    """
    heads = Heads.ALLOCATED if has_costs and not has_options else Heads.BY_TYPE
    return next(policy.name for policy in POLICIES.values() if policy.heads is heads)


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
    """The valid table of a named policy, mean image slots as near below budget x image tokens as
    whole slots allow.

    Args: window (spatial heads), evict_every and num_recent (all heads, or the semantic ones where
    heads are told apart) and num_sinks replace the policy's defaults; a default that a small budget
    cannot hold shrinks and says so in notes, a number that was asked for does not. allocation: the
    option of each head, for a policy that allocates.
    Raises: UserError for an unknown policy, a budget outside (0, 1] or too small, a number that the
    policy has no use for, no head map where one is needed.
    """
    policy = policy_of(name)
    asked = {
        key: value
        for key, value in (
            ("window", window),
            ("evict_every", evict_every),
            ("num_recent", num_recent),
            ("num_sinks", num_sinks),
        )
        if value is not None
    }
    _check_request(policy, budget, asked)
    if budget == 1 or policy.heads is Heads.EVERYTHING:
        everything = HeadOption(KEEP, config.grid.num_tokens, 1)
        per_head = [[everything] * config.num_kv_heads] * config.num_layers
        unused = f"budget 1 keeps everything: {', '.join(asked)} has no effect"
        notes = [unused] if asked else []
        return policy_from_head_options(config, name, 1.0, prompt_slots, per_head, notes=notes)
    notes = []
    options: Allocation
    if policy.heads is Heads.ALLOCATED:
        options = _given(policy, allocation)
    elif policy.heads is Heads.BY_TYPE:
        options = _by_type(policy, config, budget, asked, head_map, notes)
    else:
        options = _alike(policy, config, budget, asked, notes)
    return policy_from_head_options(
        config,
        name,
        budget,
        prompt_slots,
        options,
        score_decay=policy.score_decay,
        groups=groups,
        notes=notes,
    )


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


LEAST = {"evict_every": 1, "num_recent": 0, "num_sinks": -1}  # a window's depends on the grid


def _check_request(policy: Policy, budget: float, asked: dict[str, int]) -> None:
    """Raises UserError for a budget or number that is impossible, or that the policy does not
    take.
    """
    if not 0 < budget <= 1:
        raise UserError(
            f"budget={budget} is outside (0, 1]; use 0.2 to keep a fifth of the image tokens"
        )
    for option, value in asked.items():
        if option not in policy.options:
            others = [row.name for row in POLICIES.values() if option in row.options]
            raise UserError(
                f"policy {policy.name} takes no {option}; drop --{option.replace('_', '-')}, or use"
                f" --policy {' or '.join(others)}"
            )
        if value < LEAST.get(option, value):
            raise UserError(f"{option}={value} is too small; use {option} >= {LEAST[option]}")


def _given(policy: Policy, allocation: Allocation | None) -> Allocation:
    if allocation is None:
        raise UserError(
            f"{policy.name} needs a head map with costs; run `ssd-export calibrate`, or use "
            f"--policy {default_policy(has_costs=False, has_options=False)}"
        )
    return allocation


def _alike(
    policy: Policy, config: ModelConfig, budget: float, asked: dict[str, int], notes: list[str]
) -> Allocation:
    slots = floor(Fraction(str(budget)) * config.grid.num_tokens)
    if slots < 1:
        raise budget_too_small(
            budget, "leaves no slot for image tokens", 1 / config.grid.num_tokens
        )
    option = _option(policy, config.grid, slots, asked, notes)
    return [[option] * config.num_kv_heads] * config.num_layers


def _by_type(
    policy: Policy,
    config: ModelConfig,
    budget: float,
    asked: dict[str, int],
    head_map: HeadMap | None,
    notes: list[str],
) -> Allocation:
    if head_map is None:
        without = next(row.name for row in POLICIES.values() if _ranks_all_heads_alike(row))
        raise UserError(
            f"policy {policy.name} tells heads apart and this model has no head map; run"
            f" `ssd-export calibrate`, give --head-map FILE, or use --policy {without}"
        )
    notes += [head_map.note] if head_map.note else []
    semantic, grid = head_map.for_model(config).semantic(), config.grid
    least = (
        grid.height * policy.pinned_columns(grid).bit_count()
        + max(asked.get("num_recent", 0) - 1, 0)
        + asked.get("evict_every", 1)
    )
    num_semantic = sum(map(sum, semantic))
    num_spatial = config.num_layers * config.num_kv_heads - num_semantic
    window, slots = window_and_ranked_slots(
        budget, asked.get("window"), num_spatial, num_semantic, least, grid, notes
    )
    spatial = HeadOption(Rule(asked.get("num_sinks", -1), 0, False), window, 1)
    ranked = _option(policy, grid, slots, asked, notes) if num_semantic else spatial
    return [[ranked if is_semantic else spatial for is_semantic in layer] for layer in semantic]


def _ranks_all_heads_alike(policy: Policy) -> bool:
    return policy.heads is Heads.ALIKE and policy.by_score


def _option(
    policy: Policy, grid: Grid, slots: int, asked: dict[str, int], notes: list[str]
) -> HeadOption:
    """The policy's rule over so many image slots."""
    pinned = policy.pinned_columns(grid)
    evict_every = asked.get("evict_every")
    if evict_every is None:
        free = slots - grid.height * pinned.bit_count()
        evict_every = grid_row_buffer(free, grid.width, notes) if policy.row_buffer else 1
    num_recent = asked.get("num_recent")
    if num_recent is None:
        num_recent = recent_guard(policy.num_recent(slots, grid), slots, evict_every, notes)
    rule = Rule(asked.get("num_sinks", -1), num_recent, policy.by_score, pinned)
    return HeadOption(rule, slots, evict_every)
