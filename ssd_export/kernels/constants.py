"""What the attention kernels compile in, and how they are launched."""

from __future__ import annotations

import triton

NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of one block of keys: 16 float32 registers a thread for its running sums
MAX_BLOCK_SLOTS = 64
# Stages of the loop over slots by bytes of an element: one block of keys and values is in use, the
# others, 32 KB, are on their way. That is under the 48 KB of shared memory that every GPU grants
# unasked, and lets three programs share a multiprocessor of the smallest GPUs.
NUM_STAGES = {2: 5, 4: 3}
PROGRAMS_A_MULTIPROCESSOR = 2  # that a split fills a GPU with: 64 KB of loads on their way
MAX_SPLITS = 32

# By parameter name; the other parameters of a kernel are arguments of a launch.
CONSTANTS = ("HEAD_DIM", "BLOCK_SLOTS", "SLOT_CAPACITY", "NUM_STAGES")


def constants(head_dim: int, num_slots: int, element_bytes: int) -> dict[str, int]:
    """CONSTANTS of a kernel that attends over caches of up to num_slots slots (rounded up to a
    power of two) of elements of so many bytes.
    """
    block_slots = max(1, min(MAX_BLOCK_SLOTS, BLOCK_ELEMENTS // triton.next_power_of_2(head_dim)))
    capacity = max(triton.next_power_of_2(num_slots), 32 * NUM_WARPS)
    return dict(
        zip(CONSTANTS, (head_dim, block_slots, capacity, NUM_STAGES[element_bytes]), strict=True)
    )


def combining(compiled_in: dict[str, int]) -> dict[str, int]:
    """Constants of the kernel that adds the parts of split slots up, beside the CONSTANTS of the
    one that attends.
    """
    of_both = {name: compiled_in[name] for name in ("HEAD_DIM", "SLOT_CAPACITY")}
    return of_both | {"SPLIT_CAPACITY": MAX_SPLITS}


def splits(programs: int, num_blocks: int, num_multiprocessors: int) -> int:
    """Programs for the slots of one head, of num_blocks blocks: 1 where the heads alone fill the
    GPU.
    """
    wanted = PROGRAMS_A_MULTIPROCESSOR * num_multiprocessors // programs
    return max(1, min(wanted, num_blocks, MAX_SPLITS))
