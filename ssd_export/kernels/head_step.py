"""What the attention kernels do for one KV head of one row, R3 to R7 (defined in
policy/__init__.py), as functions that they compile in.

Everything is float32 inside. Each lane keeps its own running softmax over every BLOCK_SLOTS-th slot
and the lanes are merged once at the end. Keys and values come through shared memory, NUM_STAGES - 1
blocks ahead of their use, so that a thread waits for one of sixteen loads rather than for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssd_export.cache.state import EMPTY

EVICTED = tl.constexpr(float("inf"))
PROTECTED = tl.constexpr(3.0e38)  # finite, so that EVICTED ranks above it
NOTHING_YET = tl.constexpr(-1.0e30)  # finite: -inf minus -inf is NaN
NO_TOKEN = tl.constexpr(EMPTY)


@triton.jit
def decode_head(
    query_ptr,
    key_ptr,
    value_ptr,
    newest,
    prompt_length,
    cache_key_ptr,
    cache_value_ptr,
    cache_position_ptr,
    cache_score_ptr,
    logits_ptr,
    out_ptr,
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
    """R3 to R7 of the head whose token and caches the pointers begin at. newest: the new token's
    position.
    """
    taken, position, present, score, present_score = place_token(
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
    slot = tl.arange(0, SLOT_CAPACITY)
    is_slot = slot < num_slots
    is_scored = tl.where(is_slot, by_score, 0) != 0
    tl.store(cache_position_ptr + slot, present, mask=is_slot & (present != position))
    tl.store(cache_score_ptr + slot, present_score, mask=is_scored & (present_score != score))
    write_token(key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, taken, HEAD_DIM)
    for member in range(query_group_size):
        # Every thread sees the new token and the evicted slots, and has read the logits of the
        # member before.
        tl.debug_barrier()
        sums, largest, total = attend(
            load_query(query_ptr + member * HEAD_DIM, HEAD_DIM),
            cache_key_ptr,
            cache_value_ptr,
            cache_position_ptr,
            logits_ptr,
            0,
            num_slots,
            tl.where(by_score != 0, num_slots, 0),
            HEAD_DIM,
            BLOCK_SLOTS,
            NUM_STAGES,
        )
        store_out(out_ptr + member * HEAD_DIM, sums / total, HEAD_DIM)
        if by_score != 0:
            tl.debug_barrier()  # every thread sees the logits
            _add_scores(largest, total, logits_ptr, cache_score_ptr, num_slots, SLOT_CAPACITY)


@triton.jit
def write_token(key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, slot, HEAD_DIM: tl.constexpr):
    """Writes the new key and value into a slot."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    is_dim = dim < HEAD_DIM
    new_key = tl.load(key_ptr + dim, mask=is_dim)
    new_value = tl.load(value_ptr + dim, mask=is_dim)
    tl.store(cache_key_ptr + slot * HEAD_DIM + dim, new_key, mask=is_dim)
    tl.store(cache_value_ptr + slot * HEAD_DIM + dim, new_value, mask=is_dim)


@triton.jit
def load_query(query_ptr, HEAD_DIM: tl.constexpr):
    """Query [D] in float32, scaled."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    query = tl.load(query_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    return query * HEAD_DIM**-0.5


@triton.jit
def store_out(out_ptr, out, HEAD_DIM: tl.constexpr):
    """Stores out [D] in the cache's dtype."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    tl.store(out_ptr + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def place_token(
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
    """(the slot of the new token (R5, R6), positions before and after it is placed, scores before
    and after); writes nothing.
    """
    position, present, score, kept_score = evict_if_full(
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
        SLOT_CAPACITY,
    )
    slot = tl.arange(0, SLOT_CAPACITY)
    taken = lowest_empty(present, num_slots, SLOT_CAPACITY)
    present = tl.where(slot == taken, newest, present)
    present_score = tl.where(slot == taken, 0.0, kept_score)
    return taken, position, present, score, present_score


@triton.jit
def lowest_empty(position, num_slots, SLOT_CAPACITY: tl.constexpr):
    """The slot of the next token (R6); never outside, whatever the tensors hold."""
    slot = tl.arange(0, SLOT_CAPACITY)
    return tl.min(tl.where(position < 0, slot, num_slots - 1), 0)


@triton.jit
def evict_if_full(
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
    """(positions before and after the eviction that a full head needs (R5), 0 beyond the slots,
    scores before and after); writes nothing.
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
    return position, present, score, score * tl.where(is_full, score_decay, 1.0)


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
def attend(
    query,
    key_ptr,
    value_ptr,
    position_ptr,
    logits_ptr,
    first,
    end,
    num_kept,
    HEAD_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Over the slots from first to end: weighted sum of the values [D] of query [D], largest logit
    and total weight, the weights being relative to that logit; the logits of slots below num_kept
    stay in the workspace. position_ptr: None where every slot has a token.
    """
    BLOCK_DIM: tl.constexpr = query.shape[0]
    largest = tl.full([BLOCK_SLOTS], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    sums = tl.zeros([BLOCK_SLOTS, BLOCK_DIM], tl.float32)
    for start in tl.range(first, end, BLOCK_SLOTS, num_stages=NUM_STAGES):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        logits = _logits(query, key_ptr, position_ptr, slot, end, HEAD_DIM)
        tl.store(logits_ptr + slot, logits, mask=slot < num_kept)
        value = _load_slots(value_ptr, slot, end, HEAD_DIM, BLOCK_DIM)
        larger = tl.maximum(largest, logits)
        shrink, weight = tl.exp(largest - larger), tl.exp(logits - larger)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + weight[:, None] * value
        largest = larger
    largest_of_all = tl.max(largest, 0)
    shrink = tl.exp(largest - largest_of_all)
    total_of_all = tl.sum(total * shrink, 0)
    return tl.sum(sums * shrink[:, None], 0), largest_of_all, total_of_all


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
    if position_ptr is None:
        has_token = slot < num_slots
    else:
        has_token = tl.load(position_ptr + slot, mask=slot < num_slots, other=NO_TOKEN) >= 0
    return tl.where(has_token, tl.sum(query[None, :] * key, 1), float("-inf"))


@triton.jit
def _load_slots(cache_ptr, slot, num_slots, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Keys or values [BLOCK_SLOTS, D] of the slots, float32."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = (slot < num_slots)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(cache_ptr + slot[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
