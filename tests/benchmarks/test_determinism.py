"""Shares of images with the same tokens, by hand; and two processes give the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.determinism import CHANGES, compared, results_of
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

ROOT = Path(__file__).parents[2]


def test_shares_by_hand() -> None:
    wanted = np.zeros((4, 10), np.int32)
    found = wanted.copy()
    found[1, 3:] = 1
    found[2, 5] = 1
    row = compared(found, wanted)
    assert row == {"images": 0.5, "tokens": 1 - 8 / 40, "first": 4.0}
    same = compared(wanted, wanted)
    assert same == {"images": 1.0, "tokens": 1.0, "first": None}
    rows = [vars(CHANGES[0]) | same, vars(CHANGES[1]) | row]
    results = results_of(rows, 4)
    assert results["figures"] == {"another-process": "100.0 %", "batches-of-8": "50.0 %"}
    assert [cells[-1] for cells in results["tables"][0]["rows"]] == ["-", "sums in another order"]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    path = bundle(checkpoint(TinyJanus(num_layers=1)), "h2o", 0.1)
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        command = (
            *(sys.executable, ROOT / "cli.py", "generate", "a red circle", "--bundle", path),
            *("--seed", "7", "--out", "x.png", "--save-tokens", "x.npy"),
        )
        subprocess.run(command, cwd=tmp_path / name, check=True, capture_output=True)
        written.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"x.png", "x.npy"}
