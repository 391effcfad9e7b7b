"""Arrays in one piece of memory."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from ssd_export.runtime.huge_pages import CACHE_LINE, zeros_together

SHAPES = [((3, 5), "float32"), ((7,), "int8"), ((0, 4), "int32"), ((2, 1, 33), "float16")]


@pytest.mark.parametrize("advice", [True, False])
def test_arrays_are_zeros_apart_and_writable(advice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not advice:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    arrays = zeros_together([(shape, np.dtype(name)) for shape, name in SHAPES])
    assert [(array.shape, array.dtype.name) for array in arrays] == SHAPES
    assert all(array.ctypes.data % CACHE_LINE == 0 for array in arrays)
    for number, array in enumerate(arrays, start=1):
        assert not array.any()
        array[...] = number
    for number, array in enumerate(arrays, start=1):
        assert (array == number).all()


def test_no_arrays_are_none() -> None:
    assert zeros_together([]) == []
