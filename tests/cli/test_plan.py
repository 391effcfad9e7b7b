"""The plan verb: tables or one JSON object, nothing written, exit code 1 where something does not
fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.slow
def test_the_verb_prints_tables_or_one_object_and_writes_nothing(
    run: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    done = run("plan", "--model", "janus-pro-7b", "--target", "8GB", "--fit")
    for part in (
        "download",
        "export",
        "build-engine",
        "keys and values, heads that keep by score",
        "--weights int4",
    ):
        assert part in done.out, done.out
    values = json.loads(run("plan", "--model", "demo", "--json").out)
    assert values["policy"] == "ssd-auto" and values["does_not_fit"] == []
    assert {stage["name"] for stage in values["stages"]} == {"export", "generate on this CPU (ort)"}
    too_big = run("plan", "--model", "janus-pro-7b", "--target", "8GB", "--budget", "1")
    assert too_big.code == 1 and "of the 7.5 GiB of 8GB" in too_big.err and "--fit" in too_big.err
    assert "not here" in run("plan", "--model", "someone/else").err
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
