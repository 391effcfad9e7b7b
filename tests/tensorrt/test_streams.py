"""The double of CUDA keeps the order of one stream alone: a wait that is missing between two shows
in the result.
"""

from __future__ import annotations

import numpy as np

from tests.tensorrt.cuda_double import CudaDouble, CUresult

NUM_BYTES, ORDERS = 256, range(16)


def opened(seed: int) -> CudaDouble:
    cuda = CudaDouble(seed=seed)
    cuda.cuInit(0)
    cuda.cuCtxSetCurrent(cuda.cuDevicePrimaryCtxRetain(0)[1])
    return cuda


def carried(seed: int, waits: bool) -> int:
    """A byte that one stream writes and another carries on, read there."""
    cuda = opened(seed)
    (_, first), (_, second) = cuda.cuStreamCreate(1), cuda.cuStreamCreate(1)
    (_, source), (_, target) = cuda.cuMemAlloc(NUM_BYTES), cuda.cuMemAlloc(NUM_BYTES)
    _, event = cuda.cuEventCreate(0)
    cuda.cuMemsetD8Async(source, 7, NUM_BYTES, first)
    if waits:
        cuda.cuEventRecord(event, first)
        cuda.cuStreamWaitEvent(second, event, 0)
    cuda.cuMemcpyDtoDAsync(target, source, NUM_BYTES, second)
    read = np.zeros(NUM_BYTES, np.uint8)
    cuda.cuMemcpyDtoHAsync(read.ctypes.data, target, NUM_BYTES, second)
    cuda.cuStreamSynchronize(second)
    cuda.cuStreamSynchronize(first)
    cuda.cuEventDestroy(event)
    cuda.cuStreamDestroy(second)
    cuda.cuStreamDestroy(first)
    return int(read[0])


def test_a_stream_that_waits_finds_what_the_other_wrote() -> None:
    assert {carried(seed, waits=True) for seed in ORDERS} == {7}


def test_a_missing_wait_is_seen() -> None:
    assert {carried(seed, waits=False) for seed in ORDERS} == {7, 0xCD}


def test_a_stream_keeps_its_own_order() -> None:
    for seed in ORDERS:
        cuda = opened(seed)
        (_, stream), (_, memory) = cuda.cuStreamCreate(1), cuda.cuMemAlloc(NUM_BYTES)
        for byte in range(5):
            cuda.cuMemsetD8Async(memory, byte, NUM_BYTES, stream)
        cuda.cuStreamSynchronize(stream)
        assert cuda.memory(memory, 1)[0] == 4


def test_a_wait_is_for_the_record_before_it() -> None:
    """An event that was never recorded holds nothing up, one recorded again later neither."""
    cuda = opened(0)
    (_, first), (_, second) = cuda.cuStreamCreate(1), cuda.cuStreamCreate(1)
    _, event = cuda.cuEventCreate(0)
    cuda.cuStreamWaitEvent(second, event, 0)
    cuda.cuEventRecord(event, first)
    assert cuda.cuStreamSynchronize(second) == (CUresult.CUDA_SUCCESS,)
