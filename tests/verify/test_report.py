"""A report of verify says in words what was proved, and of a failure no more than what is known."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ssd_export.verify.checks import Divergence, Rung
from ssd_export.verify.report import lines_of
from ssd_export.verify.tolerances import TOLERANCES

GROUPS = [
    {"layer": 0, "group": 0, "heads": 2, "slots": 96, "promised": 96},
    {"layer": 0, "group": 1, "heads": 2, "slots": 448, "promised": 448},
]
COMPRESSION = {
    "groups": GROUPS,
    "bytes_allocated": 4511232,
    "bytes_promised": 4511232,
    "bytes_full_cache": 15728640,
    "image_slots_mean": 114.0,
    "budget": 0.2,
    "image_share_of_full_cache": 0.204,
}
RIGHT = [
    Rung("contract", {"graphs": ["prefill", "decode_step"], "head_map": True}),
    Rung("compression", COMPRESSION),
    Rung("ops", {"functions": 3, "greatest_error": 6.6e-7, "evict_graph": True}),
    Rung("weights", {"tensors": 156}),
    Rung("layers", {"steps": 8, "greatest_error": 2e-6}),
    Rung(
        "logits",
        {
            "steps": 576,
            "greatest_error": 1e-6,
            "steps_with_ties": 2,
            "border_draws": 0,
            "tokens_evicted_by_row": [9984, 10002],
        },
    ),
    Rung("tokens", {"agreement": 0.75, "rounding_parts_them_at_step": [432]}),
    Rung("image", {"psnr": 89.5, "ssim": 1.0}),
    Rung("operators", {"not_run": "its library is not built"}),
]


def report(rungs: list[Rung], not_run: list[str] | None = None) -> dict[str, Any]:
    return {
        "ok": all(rung.ok for rung in rungs),
        "rungs": [rung.to_dict() for rung in rungs],
        "not_run": not_run or [],
        "runner": "ort",
        "against": "torch",
        "dtype": "float32",
        "policy": "ssd-auto",
        "seed": 3,
        "tolerances": asdict(TOLERANCES["float32"]),
    }


def test_every_rung_says_what_it_proved() -> None:
    lines = list(lines_of(report(RIGHT)))
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", rung.name] for rung in RIGHT]
    assert "2 graphs" in lines[0] and "where the head map puts it" in lines[0]
    assert (
        "4,511,232 bytes, as promised; a full cache has 15,728,640" in lines[1]
        and "96 to 448 slots" in lines[1]
    )
    assert (
        "3 attention functions and the evict graph" in lines[2]
        and "error 6.6e-07, allowed 1e-05" in lines[2]
    )
    assert (
        "2 steps with equal scores" in lines[5] and "9984 to 10002 tokens evicted a row" in lines[5]
    )
    assert (
        "75 % are equal; rounding parts them at step 432" in lines[6]
        and "89.5 dB (at least 50)" in lines[7]
    )
    assert lines[-1] == "verified: ONNX Runtime against torch, float32, policy ssd-auto, seed 3"


def test_a_failed_rung_gives_its_place_and_what_was_not_run() -> None:
    found = Divergence("key", 3, 1, 0, 2, 1, 0.5, 1e-3)
    lines = list(
        lines_of(
            report(
                [*RIGHT[:4], Rung("layers", {"greatest_error": 2e-6}, found)], ["logits", "tokens"]
            )
        )
    )
    assert lines[4] == "FAILED layers      greatest error 2e-06"
    assert (
        lines[5] == "       key by 0.5 (allowed 0.001) at step 3, layer 1, group 0, head 2, row 1"
    )
    assert lines[6:] == [
        "not run: logits, tokens",
        "NOT verified: ONNX Runtime against torch, float32, policy ssd-auto, seed 3",
    ]
    failed = Rung("compression", COMPRESSION, Divergence("the cache is not compressed"))
    assert "groups" not in list(lines_of(report([failed])))[0]


def test_what_was_skipped_is_not_called_proved() -> None:
    assert "skipped numpy has no bfloat16" in next(
        lines_of(report([Rung("ops", {"skipped": "numpy has no bfloat16"})]))
    )
