"""Makes the policy table of a named policy, or of one option for each head."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

from ssd_export.config import Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.layout import group_equal_heads
from ssd_export.policy.presets import MAX_GROUPS, POLICIES, Heads, Policy, default_policy, policy_of
from ssd_export.policy.request import check_request
from ssd_export.policy.sizes import (
    budget_too_small,
    grid_row_buffer,
    recent_guard,
    slots_for_lookahead,
    window_and_ranked_slots,
)
from ssd_export.policy.table import KEEP, HeadGroup, HeadOption, PolicyTable, Rule

Allocation = Sequence[Sequence[HeadOption | tuple[Rule, int, int]]]


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
    lookahead: int | None = None,
) -> PolicyTable:
    """The valid table of a named policy, mean image slots as near below budget x image tokens as
    whole slots allow.

    Args: window (spatial heads), evict_every and num_recent (all heads, or the semantic ones where
    heads are told apart) and num_sinks replace the policy's defaults; a default that a small budget
    cannot hold shrinks and says so in notes, a number that was asked for does not. allocation: the
    option of each head, for a policy that allocates. lookahead: all heads evict before the same
    steps, so many tokens apart or a multiple, so that passes of as many tokens are seldom cut
    short; the allocation has to be made for it.
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
            ("lookahead", lookahead),
        )
        if value is not None
    }
    check_request(policy, budget, asked)
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
        lookahead=lookahead,
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
    lookahead: int | None = None,
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
        lookahead=lookahead,
    ).validate()


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
    if "lookahead" in asked:
        slots = slots_for_lookahead(slots, asked["lookahead"], budget, config.grid)
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
    lookahead = asked.get("lookahead", 1)
    least = (
        grid.height * policy.pinned_columns(grid).bit_count()
        + max(asked.get("num_recent", 0) - 1, lookahead if lookahead > 1 else 0)
        + asked.get("evict_every", lookahead)
    )
    num_semantic = sum(map(sum, semantic))
    num_spatial = config.num_layers * config.num_kv_heads - num_semantic
    window, slots = window_and_ranked_slots(
        budget, asked.get("window"), num_spatial, num_semantic, least, grid, lookahead, notes
    )
    spatial = HeadOption(Rule(asked.get("num_sinks", -1), 0, False), window, lookahead)
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
        lookahead = asked.get("lookahead", 1)
        evict_every = max(evict_every // lookahead, 1) * lookahead
    num_recent = asked.get("num_recent")
    if num_recent is None:
        num_recent = recent_guard(policy.num_recent(slots, grid), slots, evict_every, notes)
    num_sinks = asked.get("num_sinks", -1)
    rule = Rule(num_sinks, num_recent, policy.by_score, pinned, policy.age_quota)
    return HeadOption(rule, slots, evict_every)
