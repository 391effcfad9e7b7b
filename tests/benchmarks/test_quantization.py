"""The table of precisions: differences caption by caption, bounds that can be missed, runs by the
verb itself.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quantization
from benchmarks.precision_divergence import PRECISIONS, choice_of, divergence
from benchmarks.quantization import (
    BOUNDS,
    COLUMNS,
    evaluate,
    main,
    results_of,
)
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.metrics.intervals import Share
from ssd_export.metrics.scene_score import draw_scenes

pytestmark = pytest.mark.slow


def run(oks: list[bool], **changes: object) -> dict[str, Any]:
    """An answer of eval for captions judged so."""
    quarter = Share(sum(oks) // 4, len(oks) // 4).to_dict()
    return {
        "model": "demo",
        "policy": "h2o",
        "budget": 0.2,
        "num_prompts": len(oks),
        "ms_per_token": 0.5,
        "cache_bytes_per_image": 1000,
        "overall": Share(sum(oks), len(oks)).to_dict(),
        "categories": dict.fromkeys(quantization.CATEGORIES, quarter),
        "images": [{"ok": ok} for ok in oks],
        **changes,
    }


def test_differences_are_caption_by_caption() -> None:
    base, other = [True, False] * 50, [False, True] * 50  # the same score, no image judged alike
    table = results_of(
        {
            "fp32": run(base),
            "int8": run(other),
            "int4": run([True] * 45 + [False] * 55),
            "kv8": run(base),
        },
        {"int8": np.array([0.001, 0.003])},
    )["tables"][0]
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table["rows"]}
    changed, points = "images judged otherwise", "points from fp32 (95 %)"
    assert rows["`--weights int8`"][changed] == "100" and rows["`--weights int8`"][
        points
    ].startswith("+0.0 ± 19")
    kl = "KL, thousandths of a nat a token (95 %)"
    assert rows["`--weights int8`"][kl] == "2.000 ± 1.960" and rows["fp32"][kl] == "-"
    assert rows["`--weights int8`"]["bound"] == "1: holds"
    assert (
        rows["`--weights int4`"][points].startswith("-5.0 ±")
        and rows["`--weights int4`"]["bound"] == "4: missed"
    )
    assert rows["`--kv-dtype int8`"][changed] == "0" and rows["fp32"]["bound"] == "-"
    assert set(BOUNDS) == set(PRECISIONS) - {"fp32"} and "1 point is 1 images" in table["note"]


def test_the_command_writes_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(model: str, num_prompts: int, options: str) -> dict[str, Any]:
        asked.append((model, num_prompts, options))
        return run([True, False, True, True])

    monkeypatch.setattr(quantization, "evaluate", answer)
    monkeypatch.setattr(quantization, "divergences", lambda model, num_scenes: {})
    main(["--num-prompts", "4", "--num-scenes", "2", "--json", str(tmp_path / "q.json")])
    assert asked == [("demo", 4, options) for options in PRECISIONS.values()]
    written = json.loads((tmp_path / "q.json").read_text())
    assert written["command"] == "python -m benchmarks.quantization --num-prompts 4 --num-scenes 2"
    assert (
        list(written["results"]["runs"]) == list(PRECISIONS)
        and "images" not in written["results"]["runs"]["int4"]
    )


def test_scenes_tell_precisions_apart() -> None:
    """KL of the demo model: 0 from itself, and more in four bits than in eight."""
    scenes = draw_scenes(2, 1)
    with ExitStack() as stack:
        bundles = [
            stack.enter_context(temporary_bundle(PolicyChoice(**choice_of(options))))
            for options in ("", "--weights int8", "--weights int4 --head-weights int4")
        ]
        same, eight, four = (divergence(bundles[0], bundle, scenes).mean() for bundle in bundles)
    assert abs(same) < 1e-12 < eight < four


def test_runs_are_those_of_the_verb() -> None:
    made = evaluate("demo", 1, "--policy streaming-llm --budget 0.1 --kv-dtype int8")
    assert made["kv_dtype"] == "int8" and len(made["images"]) == 1
    with pytest.raises(
        SystemExit,
        match="eval --model demo --num-prompts 1 --weights int3 --json failed with exit code",
    ):
        evaluate("demo", 1, "--weights int3")
