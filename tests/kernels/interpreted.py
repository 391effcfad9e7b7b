"""Runs Python in a separate process whose Triton kernels are interpreted on the CPU: Triton's
interpreter and compiler do not mix.

    python -m tests.kernels.interpreted -m MODULE ARGUMENT...
    python -m tests.kernels.interpreted -c SCRIPT ARGUMENT...
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def interpreted(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` printed; skips without Triton, fails with what a failed run said."""
    pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return run


def interpreted_lines(*arguments: str | Path, **environment: str) -> list[dict[str, Any]]:
    """The lines that it printed, of JSON."""
    return [json.loads(line) for line in interpreted(*arguments, **environment).stdout.splitlines()]


def patched_once(patch: Callable[[Any], object]) -> Callable[[Any], object]:
    """Triton's patch of triton.language for a function, made once for each module of functions and
    then left: the interpreter makes it for every call, which takes half of its time.
    """
    done: set[int] = set()

    def once(function: Any) -> object:
        names = id(function.__globals__)
        if names not in done:
            patch(function)
            done.add(names)
        return SimpleNamespace(restore=lambda: None)

    return once


def main(kind: str, what: str, *arguments: str) -> None:
    import numpy as np
    import torch
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang"):  # it is Triton's alone; without it runs take longer
        interpreter._patch_lang = patched_once(interpreter._patch_lang)
    torch.set_num_threads(1)
    sys.argv = [what, *arguments]
    with np.errstate(all="ignore"):  # the interpreter computes masked lanes, too
        if kind == "-m":
            runpy.run_module(what, run_name="__main__")
        else:
            exec(compile(what, "<script>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
