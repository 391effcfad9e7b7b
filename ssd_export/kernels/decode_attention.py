"""The decode step of a head group as one Triton kernel: R3 to R7 (defined in policy/__init__.py),
caches written in place.

One program serves one (row, KV head) with all its query heads: it finds the slot of the new token,
evicting first if there is none, writes the token, attends and adds to the scores. Programs share
nothing, so rows and heads may be full at different steps. The rule of the group arrives as numbers,
so one compiled image serves every policy and every number of query heads; only dtype and head_dim
are compiled in.

Everything is float32 inside. Each lane keeps its own running softmax over every BLOCK_SLOTS-th slot
and the lanes are merged once at the end. Keys and values come through shared memory, NUM_STAGES - 1
blocks ahead of their use, so that a thread waits for one of sixteen loads rather than for each.
Scores need the finished softmax: a group that ranks by score leaves its logits in a workspace and
reads them again, 4 bytes a slot, instead of the keys. Query heads that share a KV head follow one
another and read out of the caches of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_export.cache.state import EMPTY, GroupState
from ssd_export.policy.table import GroupPolicy, HeadGroup, pinned_bits

NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of one block of keys: 16 float32 registers a thread for its running sums
MAX_BLOCK_SLOTS = 64
# Stages of the loop over slots by bytes of an element: one block of keys and values is in use, the
# others, 32 KB, are on their way. That is under the 48 KB of shared memory that every GPU grants
# unasked, and lets three programs share a multiprocessor of the smallest GPUs.
NUM_STAGES = {2: 5, 4: 3}
EVICTED = tl.constexpr(float("inf"))
PROTECTED = tl.constexpr(3.0e38)  # finite, so that EVICTED ranks above it
NOTHING_YET = tl.constexpr(-1.0e30)  # finite: -inf minus -inf is NaN
NO_TOKEN = tl.constexpr(EMPTY)

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
    _check(query, key, value, state, prompt_length, position)
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


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: GroupState,
    prompt_length: Tensor,
    position: Tensor,
) -> None:
    """Returns if the kernel may run on these tensors. Raises: ValueError, naming the first that
    does not fit.
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
    cache_key_ptr += first_slot * HEAD_DIM
    cache_value_ptr += first_slot * HEAD_DIM
    cache_position_ptr += first_slot
    cache_score_ptr += first_slot
    logits_ptr += first_slot
    newest = tl.load(position_ptr + row)
    prompt_length = tl.load(prompt_length_ptr + row)
    slot = _take_slot(
        cache_position_ptr,
        cache_score_ptr,
        newest,
        prompt_length,
        num_slots,
        num_sinks,
        num_recent,
        by_score,
        pinned_columns,
        grid_width,
        age_quota,
        evict_every,
        score_decay,
        SLOT_CAPACITY,
    )
    dim = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    is_dim = dim < HEAD_DIM
    new_key = tl.load(key_ptr + row * key_stride + head * HEAD_DIM + dim, mask=is_dim)
    new_value = tl.load(value_ptr + row * value_stride + head * HEAD_DIM + dim, mask=is_dim)
    tl.store(cache_key_ptr + slot * HEAD_DIM + dim, new_key, mask=is_dim)
    tl.store(cache_value_ptr + slot * HEAD_DIM + dim, new_value, mask=is_dim)
    query_ptr += row * query_stride + head * query_group_size * HEAD_DIM
    out_ptr += program.to(tl.int64) * query_group_size * HEAD_DIM
    for member in range(query_group_size):
        # Every thread sees the new token and the evicted slots, and has read the logits of the
        # member before.
        tl.debug_barrier()
        query = (
            tl.load(query_ptr + member * HEAD_DIM + dim, mask=is_dim, other=0.0).to(tl.float32)
            * HEAD_DIM**-0.5
        )
        out, largest, total = _attend(
            query,
            cache_key_ptr,
            cache_value_ptr,
            cache_position_ptr,
            logits_ptr,
            num_slots,
            tl.where(by_score != 0, num_slots, 0),
            HEAD_DIM,
            BLOCK_SLOTS,
            NUM_STAGES,
        )
        tl.store(out_ptr + member * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=is_dim)
        if by_score != 0:
            tl.debug_barrier()  # every thread sees the logits
            _add_scores(largest, total, logits_ptr, cache_score_ptr, num_slots, SLOT_CAPACITY)


@triton.jit
def _take_slot(
    position_ptr,
    score_ptr,
    newest,
    prompt_length,
    num_slots,
    num_sinks,
    num_recent,
    by_score,
    pinned_columns,
    grid_width,
    age_quota,
    evict_every,
    score_decay,
    SLOT_CAPACITY: tl.constexpr,
):
    """The slot of the new token (R5, R6), its position and score written; positions and scores as a
    eviction left.
    """
    slot = tl.arange(0, SLOT_CAPACITY)
    is_slot = slot < num_slots
    is_scored = tl.where(is_slot, by_score, 0) != 0
    position = tl.load(position_ptr + slot, mask=is_slot, other=0)
    score = tl.load(score_ptr + slot, mask=is_scored, other=0.0)
    retention = _retention(
        position,
        score,
        newest,
        prompt_length,
        num_sinks,
        num_recent,
        by_score,
        pinned_columns,
        grid_width,
    )
    retention = tl.where(is_slot, retention, EVICTED)
    is_full = tl.min(position, 0) >= 0
    count = tl.where(is_full, evict_every, 0)
    leads = is_slot
    if tl.where(is_full, age_quota, 0) != 0:
        leads = _leading_half(position, retention, newest)
    for number in range(count):
        is_turn = (age_quota == 0) | (leads == (number % 2 == 0))
        least = tl.argmin(tl.where(is_turn, retention, EVICTED), 0, tie_break_left=True)
        retention = tl.where(slot == least, EVICTED, retention)
    present = tl.where(is_slot & (retention == EVICTED), NO_TOKEN, position)
    taken = tl.min(
        tl.where(present < 0, slot, num_slots - 1), 0
    )  # never outside, whatever the tensors hold
    present = tl.where(slot == taken, newest, present)
    present_score = tl.where(slot == taken, 0.0, score * tl.where(is_full, score_decay, 1.0))
    tl.store(position_ptr + slot, present, mask=is_slot & (present != position))
    tl.store(score_ptr + slot, present_score, mask=is_scored & (present_score != score))
    return taken


@triton.jit
def _retention(
    position,
    score,
    newest,
    prompt_length,
    num_sinks,
    num_recent,
    by_score,
    pinned_columns,
    grid_width,
):
    """R3, PROTECTED for what it protects."""
    sinks = tl.where(num_sinks < 0, prompt_length, num_sinks)
    image_index = position - prompt_length
    column = tl.maximum(image_index, 0) % grid_width
    is_pinned = (image_index >= 0) & (((pinned_columns >> column) & 1) != 0)
    is_protected = (position < sinks) | (position > newest - num_recent) | is_pinned
    rank = tl.where(by_score != 0, score, position.to(tl.float32))
    return tl.where(is_protected, PROTECTED, rank)


@triton.jit
def _leading_half(position, retention, newest):
    """Whether each token is in the half that leads (R3, age_quota)."""
    is_free = retention < PROTECTED
    is_odd = newest % 2
    num_older = (tl.sum(is_free.to(tl.int32), 0) + 1 - is_odd) // 2
    # the least boundary with so many free tokens before it, by bisection: sorting takes more
    boundary, high = newest * 0, newest
    while boundary < high:
        middle = boundary + (high - boundary) // 2
        is_enough = tl.sum((is_free & (position < middle)).to(tl.int32), 0) >= num_older
        boundary = tl.where(is_enough, boundary, middle + 1)
        high = tl.where(is_enough, middle, high)
    return (position < boundary) != (is_odd != 0)


@triton.jit
def _attend(
    query,
    key_ptr,
    value_ptr,
    position_ptr,
    logits_ptr,
    num_slots,
    num_kept,
    HEAD_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out [D] of query [D], and the softmax's largest logit and total; the logits of the first
    num_kept slots stay in the workspace.
    """
    BLOCK_DIM: tl.constexpr = query.shape[0]
    largest = tl.full([BLOCK_SLOTS], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    sums = tl.zeros([BLOCK_SLOTS, BLOCK_DIM], tl.float32)
    for start in tl.range(0, num_slots, BLOCK_SLOTS, num_stages=NUM_STAGES):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        logits = _logits(query, key_ptr, position_ptr, slot, num_slots, HEAD_DIM)
        tl.store(logits_ptr + slot, logits, mask=slot < num_kept)
        value = _load_slots(value_ptr, slot, num_slots, HEAD_DIM, BLOCK_DIM)
        larger = tl.maximum(largest, logits)
        shrink, weight = tl.exp(largest - larger), tl.exp(logits - larger)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + weight[:, None] * value
        largest = larger
    largest_of_all = tl.max(largest, 0)
    shrink = tl.exp(largest - largest_of_all)
    total_of_all = tl.sum(total * shrink, 0)
    return tl.sum(sums * shrink[:, None], 0) / total_of_all, largest_of_all, total_of_all


@triton.jit
def _add_scores(largest, total, logits_ptr, score_ptr, num_slots, SLOT_CAPACITY: tl.constexpr):
    """Adds the probabilities of one query head to the scores (R2)."""
    slot = tl.arange(0, SLOT_CAPACITY)
    is_slot = slot < num_slots
    logits = tl.load(logits_ptr + slot, mask=is_slot, other=float("-inf"))
    score = tl.load(score_ptr + slot, mask=is_slot, other=0.0)
    tl.store(score_ptr + slot, score + tl.exp(logits - largest) / total, mask=is_slot)


@triton.jit
def _logits(query, key_ptr, position_ptr, slot, num_slots, HEAD_DIM: tl.constexpr):
    """Logits [BLOCK_SLOTS], -inf for an empty slot. Products in float32: tensor cores would round
    them.
    """
    key = _load_slots(key_ptr, slot, num_slots, HEAD_DIM, query.shape[0])
    position = tl.load(position_ptr + slot, mask=slot < num_slots, other=NO_TOKEN)
    return tl.where(position >= 0, tl.sum(query[None, :] * key, 1), float("-inf"))


@triton.jit
def _load_slots(cache_ptr, slot, num_slots, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Keys or values [BLOCK_SLOTS, D] of the slots, float32."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = (slot < num_slots)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(cache_ptr + slot[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
