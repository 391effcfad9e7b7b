"""The decode step of a head group as one Triton kernel: R3 to R7 (defined in policy/__init__.py),
caches written in place.

One program serves one (row, KV head) with all its query heads: it finds the slot of the new token,
evicting first if there is none, writes the token, attends and adds to the scores. Programs share
nothing, so rows and heads may be full at different steps. The rule of the group arrives as numbers,
so one compiled image serves every policy and every number of query heads; only dtype and head_dim
are compiled in.

Scores need the finished softmax: a group that ranks by score leaves its logits in a workspace and
reads them again, 4 bytes a slot, instead of the keys. Query heads that share a KV head follow one
another and read out of the caches of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.kernels.head_step import decode_head
from ssd_export.policy.table import GroupPolicy, HeadGroup, pinned_bits

NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of one block of keys: 16 float32 registers a thread for its running sums
MAX_BLOCK_SLOTS = 64
# Stages of the loop over slots by bytes of an element: one block of keys and values is in use, the
# others, 32 KB, are on their way. That is under the 48 KB of shared memory that every GPU grants
# unasked, and lets three programs share a multiprocessor of the smallest GPUs.
NUM_STAGES = {2: 5, 4: 3}

# What the kernel compiles in, by parameter name; the other parameters are arguments of a launch, in
# this order.
CONSTANTS = ("HEAD_DIM", "BLOCK_SLOTS", "SLOT_CAPACITY", "NUM_STAGES")
SCALARS = (
    "query_stride",
    "key_stride",
    "value_stride",
    "num_heads",
    "query_group_size",
    "num_slots",
    "num_sinks",
    "num_recent",
    "by_score",
    "pinned_columns",
    "grid_width",
    "age_quota",
    "evict_every",
    "score_decay",
)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: GroupState,
    policy: GroupPolicy,
    prompt_length: Tensor,
    position: Tensor,
) -> Tensor:
    """One decode step of a head group (R7), as cache.attention.decode_attention but on the GPU.
    Changes state.

    Args: query [B, H*G, D]; key, value [B, H, D], after RoPE, heads of a row contiguous (a slice of
    all heads is); prompt_length, position int [B], position being the new token's.
    Returns: out [B, H*G, D].
    Raises: ValueError where shapes, dtypes, strides or devices do not fit the state.
    """
    check_tensors(query, key, value, state, prompt_length, position)
    rows, num_heads, head_dim = key.shape
    num_slots, group = state.position.shape[2], policy.group
    rule = group.rule
    score = state.score if rule.by_score else query.new_empty(0, dtype=torch.float32)  # never read
    logits = query.new_empty(logits_elements(rows, group, num_slots), dtype=torch.float32)
    out = query.new_empty(query.shape)
    decode_attention_kernel[(rows * num_heads,)](
        query,
        key,
        value,
        position.to(torch.int32),
        prompt_length.to(torch.int32),
        state.key,
        state.value,
        state.position,
        score,
        logits,
        out,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        num_heads,
        query.shape[1] // num_heads,
        num_slots,
        rule.num_sinks,
        rule.num_recent,
        int(rule.by_score),
        pinned_bits(rule.pinned_columns),
        policy.grid_width,
        int(rule.age_quota),
        group.evict_every,
        float(policy.score_decay),
        **constants(head_dim, num_slots, query.element_size()),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


def logits_elements(rows: int, group: HeadGroup, num_slots: int) -> int:
    """float32 numbers that one launch keeps between attending and adding to the scores."""
    return rows * group.num_heads * num_slots if group.rule.by_score else 0


def constants(head_dim: int, num_slots: int, element_bytes: int) -> dict[str, int]:
    """CONSTANTS of the kernel for caches of up to num_slots slots (rounded up to a power of two)
    of elements of so many bytes.
    """
    block_slots = max(1, min(MAX_BLOCK_SLOTS, BLOCK_ELEMENTS // triton.next_power_of_2(head_dim)))
    capacity = max(triton.next_power_of_2(num_slots), 32 * NUM_WARPS)
    return dict(
        zip(CONSTANTS, (head_dim, block_slots, capacity, NUM_STAGES[element_bytes]), strict=True)
    )


def check_tensors(
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
    query_heads = query.shape[1] if query.dim() == 3 else 0
    if query_heads < num_heads or query_heads % num_heads:
        raise ValueError(
            f"query {tuple(query.shape)} has no whole number of query heads for {num_heads} KV"
            " heads"
        )
    dtype, int_dtypes = state.key.dtype, (torch.int32, torch.int64)
    wanted = [
        ("query", query, (rows, query_heads, head_dim), (dtype,)),
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
        if tensor.stride(2) != 1 or tensor.stride(1) != head_dim:
            raise ValueError(
                f"{name} has strides {tensor.stride()}; the heads of a row must be contiguous"
            )
    caches = (state.key, state.value, state.position, state.score)
    if not all(cache.is_contiguous() for cache in caches if cache is not None):
        raise ValueError("the cache tensors must be contiguous")


@triton.jit(do_not_specialize=SCALARS)
def decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    prompt_length_ptr,
    cache_key_ptr,
    cache_value_ptr,
    cache_position_ptr,
    cache_score_ptr,
    logits_ptr,
    out_ptr,
    query_stride,
    key_stride,
    value_stride,
    num_heads,
    query_group_size,
    num_slots,
    num_sinks,
    num_recent,
    by_score,
    pinned_columns,
    grid_width,
    age_quota,
    evict_every,
    score_decay,
    HEAD_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    SLOT_CAPACITY: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One decode step of one KV head of one row (R3 to R7)."""
    # query, out: [B, H*G, D]; key, value: [B, H, D]; position, prompt_length: int32 [B]; cache_key,
    # cache_value: [B, H, S, D]; cache_position: int32 [B, H, S]; cache_score, logits: float32
    # [B, H, S], any address unless by_score
    program = tl.program_id(0)
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    first_slot = program.to(tl.int64) * num_slots
    decode_head(
        query_ptr + row * query_stride + head * query_group_size * HEAD_DIM,
        key_ptr + row * key_stride + head * HEAD_DIM,
        value_ptr + row * value_stride + head * HEAD_DIM,
        tl.load(position_ptr + row),
        tl.load(prompt_length_ptr + row),
        cache_key_ptr + first_slot * HEAD_DIM,
        cache_value_ptr + first_slot * HEAD_DIM,
        cache_position_ptr + first_slot,
        cache_score_ptr + first_slot,
        logits_ptr + first_slot,
        out_ptr + program.to(tl.int64) * query_group_size * HEAD_DIM,
        query_group_size,
        num_slots,
        num_sinks,
        num_recent,
        by_score,
        pinned_columns,
        grid_width,
        age_quota,
        evict_every,
        score_decay,
        HEAD_DIM,
        BLOCK_SLOTS,
        SLOT_CAPACITY,
        NUM_STAGES,
    )
