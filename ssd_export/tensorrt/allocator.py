"""Lets the C library give large buffers back as soon as they are freed, so that a build's peak is
what is in use.

glibc raises the size from which a buffer has its own mapping, up to 32 MiB, each time such a
buffer is freed. Later ones lie in its heap, which shrinks only from its end, and TensorRT copies
matrices of that size one after another. Measured with TensorRT-RTX 1.7.1 on the decode step of
Janus-Pro-1B's shape in int4: 2962 MiB at the peak, with a fixed size 2599, in the same time.
"""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BYTES = 1 << 20


def return_large_buffers() -> bool:
    """Whether buffers of LARGE_BYTES and more are from now on given back when freed; other C
    libraries than glibc have their own rules."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) == 1
