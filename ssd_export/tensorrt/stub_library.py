"""Gives TensorRT-RTX's ONNX parser the library name that its wheel lacks, within the running
process.

The parser opens `libtensorrt_rtx.so` by name; the wheel ships `libtensorrt_rtx.so.1` alone, and
without the short name the process aborts. The loader takes a library that is already loaded if its
SONAME is the name asked for. So an empty library of that SONAME, which needs the real one, is made
in memory (a few hundred bytes, no compiler, no file) and loaded: symbols looked up in it are found
in what it needs. No LD_LIBRARY_PATH, no second start of the program.

Source: ELF-64 specification, System V gABI chapters 4 and 5.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

HEADER_BYTES, SEGMENT_BYTES, SYMBOL_BYTES, NUM_SEGMENTS = 64, 56, 24, 3
SHARED_OBJECT = 3
LOAD, DYNAMIC, GNU_STACK = 1, 2, 0x6474E551
READ_WRITE = 6
NEEDED, STRING_TABLE, SYMBOL_TABLE, STRING_BYTES, SYMBOL_SIZE, SONAME, END = 1, 5, 6, 10, 11, 14, 0
MACHINES = {"x86_64": 62, "aarch64": 183}


def stub_library(soname: str, needed: str, machine: int) -> bytes:
    """A 64-bit little-endian ELF library without code: its name, what it needs, an empty symbol
    table.
    """
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    symbols = HEADER_BYTES + NUM_SEGMENTS * SEGMENT_BYTES
    names = symbols + SYMBOL_BYTES
    dynamic = (names + len(strings) + 7) // 8 * 8
    entries = [
        (SONAME, 1),
        (NEEDED, 2 + len(soname)),
        (STRING_TABLE, names),
        (SYMBOL_TABLE, symbols),
        (STRING_BYTES, len(strings)),
        (SYMBOL_SIZE, SYMBOL_BYTES),
        (END, 0),
    ]
    end = dynamic + 16 * len(entries)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\2\1\1",
        SHARED_OBJECT,
        machine,
        1,
        0,
        HEADER_BYTES,
        0,
        0,
        HEADER_BYTES,
        SEGMENT_BYTES,
        NUM_SEGMENTS,
        0,
        0,
        0,
    )
    segments = [
        (LOAD, 0, end, 0x10000),
        (DYNAMIC, dynamic, end - dynamic, 8),
        (GNU_STACK, 0, 0, 16),
    ]
    for (
        kind,
        offset,
        size,
        alignment,
    ) in segments:  # without the last, the loader would ask for an executable stack
        header += struct.pack(
            "<IIQQQQQQ", kind, READ_WRITE, offset, offset, offset, size, size, alignment
        )
    body = (header + bytes(SYMBOL_BYTES) + strings).ljust(dynamic, b"\0")
    return body + b"".join(struct.pack("<qQ", *entry) for entry in entries)


def load_stub(soname: str, needed: str) -> None:
    """Makes `dlopen(soname)` find the library `needed`, which is loaded, until the process ends.

    Raises: OSError where the loader refuses; nothing happens on other systems than Linux, which
    have other names.
    """
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        return
    try:
        ctypes.CDLL(soname)
        return
    except OSError:  # the usual case: there is no library of this name
        pass
    file = os.memfd_create(soname)
    try:
        os.write(file, stub_library(soname, needed, MACHINES[os.uname().machine]))
        ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(file)
    ctypes.CDLL(soname)
