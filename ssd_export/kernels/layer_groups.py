"""Head groups of a layer as arguments of one kernel: a tuple for each number and each cache, of
which a program chooses its own group's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.policy.layout import group_slices
from ssd_export.policy.presets import MAX_GROUPS
from ssd_export.policy.table import GroupPolicy, pinned_bits

OfGroups = tuple[int, ...]  # one number for each of MAX_GROUPS


@dataclass(frozen=True)
class LayerNumbers:
    """Numbers of a launch, in the order of the kernels' parameters; the tuples are by group."""

    query_stride: int
    key_stride: int
    value_stride: int
    num_heads: int
    query_group_size: int
    grid_width: int
    score_decay: float
    most_slots: int
    first_heads: OfGroups
    group_heads: OfGroups
    group_slots: OfGroups
    num_sinks: OfGroups
    num_recent: OfGroups
    by_score: OfGroups
    pinned_columns: OfGroups
    age_quota: OfGroups
    evict_every: OfGroups

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, policies: Sequence[GroupPolicy]
    ) -> LayerNumbers:
        """Those of tokens query [B, H*G, D], key and value [B, H, D]."""
        groups = [policy.group for policy in policies]
        rules, num_heads = [group.rule for group in groups], key.shape[1]
        return cls(
            query.stride(0),
            key.stride(0),
            value.stride(0),
            num_heads,
            query.shape[1] // num_heads,
            policies[0].grid_width,
            float(policies[0].score_decay),
            max(group.num_slots for group in groups),
            _of_groups([part.start for part in group_slices(groups)], absent=num_heads),
            _of_groups([group.num_heads for group in groups]),
            _of_groups([group.num_slots for group in groups]),
            _of_groups([rule.num_sinks for rule in rules]),
            _of_groups([rule.num_recent for rule in rules]),
            _of_groups([rule.by_score for rule in rules]),
            _of_groups([pinned_bits(rule.pinned_columns) for rule in rules]),
            _of_groups([rule.age_quota for rule in rules]),
            _of_groups([group.evict_every for group in groups]),
        )


NUMBERS = tuple(field.name for field in fields(LayerNumbers))
OF_GROUPS = tuple(field.name for field in fields(LayerNumbers) if field.type == "OfGroups")


def _of_groups(values: Sequence[int], absent: int = 1) -> OfGroups:
    """absent: of groups that a layer has not got, which no program is in."""
    return (*map(int, values), *[absent] * (MAX_GROUPS - len(values)))


def caches_of(states: Sequence[GroupState]) -> tuple[tuple[Tensor, ...], ...]:
    """Keys, values, positions and scores by group; what a group has not got is never read."""
    padded = [*states, *[states[0]] * (MAX_GROUPS - len(states))]
    none = torch.empty(0, dtype=torch.float32, device=states[0].key.device)
    return (
        tuple(state.key for state in padded),
        tuple(state.value for state in padded),
        tuple(state.position for state in padded),
        tuple(none if state.score is None else state.score for state in padded),
    )


def check_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: GroupState,
    prompt_length: Tensor,
    position: Tensor,
) -> None:
    """Returns if a kernel may run on these tensors of a head group.

    Raises: ValueError, naming the first that does not fit.
    """
    rows, num_heads, num_slots, head_dim = state.key.shape
    token, slots = (rows, num_heads, head_dim), (rows, num_heads, num_slots)
    dtype, int_dtypes = state.key.dtype, (torch.int32, torch.int64)
    wanted = [
        ("query", query, (rows, query.shape[1], head_dim), (dtype,)),
        ("key", key, token, (dtype,)),
        ("value", value, token, (dtype,)),
        ("cached value", state.value, (*slots, head_dim), (dtype,)),
        ("cached position", state.position, slots, (torch.int32,)),
        ("position", position, (rows,), int_dtypes),
        ("prompt_length", prompt_length, (rows,), int_dtypes),
    ]
    if state.score is not None:
        wanted.append(("cached score", state.score, slots, (torch.float32,)))
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel has no dtype {dtype}; use float16, bfloat16 or float32")
    for name, tensor, shape, dtypes in wanted:
        if (
            tuple(tensor.shape) != shape
            or tensor.dtype not in dtypes
            or tensor.device != state.key.device
        ):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; the cache"
                f" wants {dtypes[0]} {shape} on {state.key.device}"
            )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        heads_apart = tensor.shape[1] > 1 and tensor.stride(1) != head_dim
        if heads_apart or (head_dim > 1 and tensor.stride(2) != 1):
            raise ValueError(
                f"{name} has strides {tensor.stride()}; the heads of a row must be contiguous"
            )
    caches = (state.key, state.value, state.position, state.score)
    if not all(cache.is_contiguous() for cache in caches if cache is not None):
        raise ValueError("the cache tensors must be contiguous")


@triton.jit
def of_group(values, group):
    """The value of a group; values: a tuple of MAX_GROUPS."""
    return tl.where(group == 0, values[0], tl.where(group == 1, values[1], values[2]))


@triton.jit
def group_of(head, first_heads):
    """The group of a KV head of the layer."""
    return (head >= first_heads[1]).to(tl.int32) + (head >= first_heads[2]).to(tl.int32)


@triton.jit
def first_slot_of(row, head, group, first_heads, group_heads, group_slots):
    """Where the slots of a row's head begin in the caches of its group. row: int64."""
    head_in_group = head - of_group(first_heads, group)
    return (row * of_group(group_heads, group) + head_in_group) * of_group(group_slots, group)
