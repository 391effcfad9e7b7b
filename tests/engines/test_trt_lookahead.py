"""Lookahead in the backends tensorrt and tensorrt-rtx, over doubles that execute: the tokens, slots
and number of passes of Python's. Nothing here runs on a GPU.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.export.exporter import export_bundle
from ssd_export.export.temporary_bundle import PolicyChoice
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.tensorrt.step_form import AS_BUNDLED, KV_UPDATE
from tests.engines.cases import LOOKAHEAD_AUTO
from tests.engines.test_tensorrt import calls_of, edit_engine_json, python_engines
from tests.engines.trt_builds import TrtBuild, add_engines
from tests.runtime.checkpoints import PROMPTS
from tests.runtime.test_lookahead import caches, lookahead_bundle, random_bundle
from tests.tensorrt.trt_bundles import copied_bundle, found_doubles

pytestmark = pytest.mark.slow

WINDOW = 8
RTX, TENSORRT = "tensorrt-rtx", "tensorrt"
OUT_OF_MEMORY, INVALID, INTERNAL = 5, 2, 9


def full(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    return copied_bundle(folder, "full")


def trained(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The demo, whose drafts are right."""
    return export_bundle(PolicyChoice(policy="full", budget=1.0).export_spec(folder / "bundle"))


def evicting_together(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    return Path(shutil.copytree(lookahead_bundle(0, 8, patch), folder / "bundle"))


def evicting_apart(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Random rules that decay scores; images leave one another behind."""
    return Path(shutil.copytree(random_bundle(1, patch), folder / "bundle"))


@dataclass(frozen=True)
class Case:
    """options: of ImageGenerator.stream; engines: of write_engines."""

    bundle: Callable[[Path, pytest.MonkeyPatch], Path]
    num_images: int
    options: dict[str, Any]
    flavor: str = RTX
    engines: dict[str, Any] = field(default_factory=dict)
    lookahead: int = WINDOW


CASES = {
    "full caches": Case(full, 1, {"seed": 5, "temperature": 0.5}),
    "full caches, two images": Case(full, 2, {"seed": 5, "temperature": 0.5}),
    "full caches, greedy": Case(full, 2, {"temperature": 0}, engines={"form": AS_BUNDLED}),
    "full caches that nothing shares": Case(
        full, 2, {"seed": 6, "temperature": 0.5}, TENSORRT, {"form": AS_BUNDLED}
    ),
    "steps write in place, passes do not": Case(
        full, 1, {"seed": 7, "temperature": 0.5}, TENSORRT, {"form": KV_UPDATE}
    ),
    "full caches, all written in place by the plugin": Case(
        full, 2, {"seed": 5, "temperature": 0.5}, engines={"plugin": True}
    ),
    "top-k": Case(full, 2, {"seed": 3, "top_k": 3, "temperature": 0.3}, engines={"top_k": True}),
    "fewer tokens than there are places": Case(full, 2, {"seed": 5}, lookahead=3),
    "heads that evict together": Case(evicting_together, 1, {"seed": 1, "temperature": 0.3}),
    "two images, evicting together": Case(evicting_together, 2, {"seed": 1, "temperature": 0.3}),
    "evicting together, greedy": Case(evicting_together, 2, {"temperature": 0}),
    "evictions at steps of each image": Case(evicting_apart, 2, {"temperature": 0}),
    "the plugin, evicting at steps of each image": Case(
        evicting_apart, 2, {"temperature": 0}, engines={"plugin": True}
    ),
}


def with_windows(
    case: Case, trt: TrtBuild, folder: Path, patch: pytest.MonkeyPatch, window: int = WINDOW
) -> Path:
    """The case's bundle with engines for passes of so many tokens."""
    path = case.bundle(folder, patch)
    add_engines(path, trt, case.flavor, window=window, **case.engines)
    return path


def asked(case: Case, path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "bundle": str(path),
        "prompts": PROMPTS[: case.num_images],
        "backend": case.flavor,
        "lookahead": case.lookahead,
        **case.options,
        **changes,
    }


@pytest.mark.parametrize("name", CASES)
def test_tokens_slots_and_passes_are_pythons(
    name: str, trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    path, slots = with_windows(case, trt, tmp_path, monkeypatch), tmp_path / "slots"
    (made,) = trt.run(path, [asked(case, path)], tmp_path, SSD_FAKE_SLOTS=str(slots))
    assert "error" not in made.facts, made.facts
    with ImageGenerator.from_bundle(path, num_threads=1) as reference:
        prompts = PROMPTS[: case.num_images]
        wanted = reference(prompts, num_images=1, lookahead=case.lookahead, **case.options)
        positions = [cache.ravel() for cache in caches(reference, "position")]
        passes = reference.passes
    assert len(np.unique(wanted.tokens)) > 10, "a case whose tokens could not differ"
    np.testing.assert_array_equal(made.tokens, wanted.tokens)
    assert made.facts["passes"] == passes < wanted.tokens.shape[1] - 1
    assert made.facts["step_is_captured"] == 1
    np.testing.assert_array_equal(np.fromfile(slots, np.int32), np.concatenate(positions))
    assert calls_of(tmp_path).count(f"run decode_window{'_top_k' * ('top_k' in case.options)}") > 1


def test_auto_takes_the_passes_that_python_takes(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(trained, 1, {"seed": 4})
    path = with_windows(case, trt, tmp_path, monkeypatch)
    (made,) = trt.run(path, [asked(case, path, lookahead=LOOKAHEAD_AUTO)], tmp_path)
    with found_doubles(monkeypatch, path).generator() as generator:
        wanted = generator(PROMPTS[:1], lookahead="auto", **case.options).tokens
        assert made.facts["passes"] == generator.passes
    np.testing.assert_array_equal(made.tokens, wanted)
    calls = calls_of(tmp_path)
    assert "run decode_window" in calls and calls.count("run decode_step") > 2


def test_a_pass_is_one_launch_and_one_wait(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(full, 1, {"temperature": 0})
    path = with_windows(case, trt, tmp_path, monkeypatch)
    made = trt.run(path, [asked(case, path), asked(case, path)], tmp_path)
    calls, passes = calls_of(tmp_path), made[1].facts["passes"]
    assert calls.count("cuStreamBeginCapture") == 1, "captured once for all batches of this size"
    assert calls.count("cuGraphLaunch") == 2 * passes - 1, "and the run before the capture"
    launches = [place for place, call in enumerate(calls) if call == "cuGraphLaunch"]
    for before, after in zip(launches[-passes:], launches[1 - passes :], strict=False):
        inside = calls[before:after]
        assert inside.count("cuStreamSynchronize") <= 3, "the pass, and a row's tokens and logits"
        assert inside.count("cuMemcpyDtoHAsync") <= 4
        assert "cuMemAlloc" not in inside


def test_batches_of_other_kinds_in_the_same_memory(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, greedy, single steps, another size, fewer tokens: no noise or slot of the one before
    is left.
    """
    case = Case(full, 2, {})
    path = with_windows(case, trt, tmp_path, monkeypatch)
    kinds: list[dict[str, Any]] = [
        {"seed": 2},
        {"temperature": 0.0},
        {"seed": 3, "lookahead": 1},
        {"seed": 3, "lookahead": 4},
        {"seed": 2, "prompts": PROMPTS[:1]},
        {"seed": 2},
    ]
    made = trt.run(path, [asked(case, path, **kind) for kind in kinds], tmp_path)
    with ImageGenerator.from_bundle(path, num_threads=1) as reference:
        for kind, generated in zip(kinds, made, strict=True):
            options = {"lookahead": WINDOW, "prompts": PROMPTS[:2], **kind}
            wanted = reference(options.pop("prompts"), **options)
            assert generated.facts["passes"] == reference.passes
            np.testing.assert_array_equal(generated.tokens, wanted.tokens)


def test_passes_that_cannot_be_captured_are_queued(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(full, 1, {"seed": 7, "temperature": 0.5}, TENSORRT)
    path = with_windows(case, trt, tmp_path, monkeypatch)
    made = [
        trt.run(path, [asked(case, path)], tmp_path, SSD_FAKE_REFUSE=call)[0]
        for call in ("none", "cuStreamBeginCapture")
    ]
    np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
    assert made[0].facts["passes"] == made[1].facts["passes"]
    assert [one.facts["step_is_captured"] for one in made] == [1, 0]
    assert "cuGraphLaunch" not in calls_of(tmp_path)


@dataclass(frozen=True)
class Refusal:
    """What is asked of which engines, and the answer: a status and a pattern."""

    status: int
    sentence: str
    engines: dict[str, Any] = field(default_factory=lambda: {"window": WINDOW})
    changes: dict[str, Any] = field(default_factory=dict)
    refuse: str = ""


REFUSALS = {
    "engines without it": Refusal(
        INVALID,
        "these engines take one token a pass; build it here: ssd-export build-engine --bundle .*"
        " --lookahead 16, or use lookahead 1",
        {},
    ),
    "a wider pass": Refusal(
        INVALID,
        "a pass of these engines has up to 8 tokens, not 9; use lookahead 8, or build-engine"
        " --lookahead 9",
        changes={"lookahead": 9},
    ),
    "too many images": Refusal(
        INVALID,
        "engines take passes of lookahead for up to 16 images at once, not 17; use max_batch 16,"
        " or lookahead 1",
        {"window": WINDOW, "images": (1, 1, 20)},
        {"num_images": 17, "max_batch": 17},
    ),
    "no engine with top-k": Refusal(
        4,
        ".* has no engine of prefill_top_k; build it here: .* --top-k, or use the backend .*",
        changes={"top_k": 5},
    ),
    "no run of it": Refusal(
        INTERNAL, "TensorRT refused a run of decode_window: .*", refuse="enqueueV3:3"
    ),
    "no memory for it": Refusal(
        INTERNAL, "cuMemAlloc: a reason of the driver; nvidia-smi .*", refuse="cuMemAlloc:4"
    ),
    "no memory for its noise": Refusal(
        INTERNAL, "cuMemAlloc: a reason of the driver; nvidia-smi .*", refuse="cuMemAlloc:5"
    ),
    "no launch of it": Refusal(
        INTERNAL, "cuGraphLaunch: a reason of the driver; nvidia-smi .*", refuse="cuGraphLaunch:2"
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_a_status_and_a_sentence(
    name: str, trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal, case = REFUSALS[name], Case(full, 1, {})
    path = case.bundle(tmp_path, monkeypatch)
    add_engines(path, trt, RTX, **refusal.engines)
    wanted = asked(case, path, first_row=True, **refusal.changes)
    (made,) = trt.run(path, [wanted], tmp_path, SSD_FAKE_REFUSE=refusal.refuse)
    assert re.fullmatch(refusal.sentence, made.facts.get("error", "")), made.facts
    assert made.facts["status"] == refusal.status


def test_auto_takes_single_steps_where_engines_have_no_pass(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(full, 1, {"seed": 4})
    path = case.bundle(tmp_path, monkeypatch)
    add_engines(path, trt, RTX)
    wanted = asked(case, path, lookahead=LOOKAHEAD_AUTO, first_row=True)
    (made,) = trt.run(path, [wanted], tmp_path)
    assert "error" not in made.facts, made.facts
    assert calls_of(tmp_path).count("run decode_step") == 24


def test_a_window_that_cannot_be_is_refused_in_pythons_words(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(full, 1, {})
    path = with_windows(case, trt, tmp_path, monkeypatch)
    edit_engine_json('"window": 8', '"window": 65')(path)
    with pytest.raises(UserError) as refused:
        python_engines(open_bundle(path), trt, RTX)
    (made,) = trt.run(path, [asked(case, path)], tmp_path)
    assert made.facts["error"] == str(refused.value)


def test_the_pass_has_its_own_memory_that_must_be_there(
    trt: TrtBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(full, 1, {})
    path = with_windows(case, trt, tmp_path, monkeypatch)
    least, most = 1 << 20, 1 << 28  # bytes of the device: too few for a batch, enough for all
    while most - least > 4096:
        middle = (least + most) // 2
        (made,) = trt.run(
            path, [asked(case, path, first_row=True)], tmp_path, SSD_FAKE_BYTES=str(middle)
        )
        least, most = (middle, most) if "error" in made.facts else (least, middle)
    (made,) = trt.run(
        path, [asked(case, path, first_row=True)], tmp_path, SSD_FAKE_BYTES=str(least)
    )
    assert made.facts["status"] == OUT_OF_MEMORY
    assert re.match(
        "a pass of lookahead needs .* of device memory and .* are free", made.facts["error"]
    )
