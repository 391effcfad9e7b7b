"""The verbs eval, sweep and verify, what they print, write and refuse; what bench refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from ssd_export.export.exporter import export_bundle
from ssd_export.export.temporary_bundle import PolicyChoice
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), TinyJanus(num_layers=1)
    )


def bundle_of(checkpoint: Path, path: Path) -> Path:
    return export_bundle(PolicyChoice(str(checkpoint), "h2o", 0.1).export_spec(path))


def test_eval_of_a_policy(run: Run, checkpoint: Path) -> None:
    done = run(
        "eval",
        "--model",
        checkpoint,
        "--policy",
        "h2o",
        "--budget",
        0.1,
        "--num-prompts",
        4,
        "--sheet",
        "s.png",
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == [
        "single",
        "counting",
        "two objects",
        "relation",
        "overall",
    ]
    assert "0 of 4" in lines[4] and "policy h2o, budget 0.1" in lines[5]
    assert "generating 4 images: done in" in done.err
    with Image.open("s.png") as sheet:
        assert sheet.width >= 192


def test_eval_of_a_bundle_as_json(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    bundle_of(checkpoint, tmp_path / "b")
    done = run(
        "eval", "--bundle", "b", "--num-prompts", 1, "--batch", 1, "--temperature", 0, "--json"
    )
    facts = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(facts["categories"]) == ["single"], "one caption: those without any are left out"
    assert facts["overall"]["total"] == 1 and facts["policy"] == "h2o" and facts["temperature"] == 0
    assert facts["images"][0]["reasons"]


def test_verify_proves_a_bundle_and_leaves_a_report(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    path = bundle_of(checkpoint, tmp_path / "b")
    done = run("verify", "--bundle", "b", "--model", checkpoint, "--level", "layers")
    assert done.code == 0, done.out + done.err
    assert (
        "ok     compression" in done.out
        and "verified: ONNX Runtime against the checkpoint in torch, float32, policy h2o"
        in done.out
    )
    report = json.loads((path / "reports" / "verify.json").read_text())
    assert report["ok"] and json.loads(run("inspect", "b", "--json").out)["reports"] == [
        "reports/verify.json"
    ]
    (path / "reports" / "verify.json").write_text("{}")  # what can be made again is no condition
    assert run("verify", "--bundle", "b").code == 0
    assert json.loads((path / "reports" / "verify.json").read_text())["ok"]


def test_verify_fails_with_exit_code_1_and_says_where(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.runtime.ort_runner import OrtRunner

    cache_bytes = OrtRunner.cache_bytes
    monkeypatch.setattr(OrtRunner, "cache_bytes", lambda self: cache_bytes(self) + 1)
    bundle_of(checkpoint, tmp_path / "b")
    done = run("verify", "--bundle", "b", "--against", "torch", "--level", "ops")
    assert (
        done.code == 1
        and "FAILED compression" in done.out
        and "NOT verified" in done.out
        and "not run: ops" in done.out
    )
    done = run("verify", "--bundle", "b", "--against", "torch", "--level", "ops", "--json")
    assert done.code == 1 and json.loads(done.out)["ok"] is False


@pytest.mark.slow
def test_sweep_prints_its_table_and_what_there_is_of_it(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (
        "sweep",
        "--model",
        checkpoint,
        "--policies",
        "h2o",
        "--budgets",
        "0.1",
        "--num-prompts",
        1,
        "--seeds",
        1,
    )
    done = run(*args, "--num-scenes", 1)
    assert done.code == 0, done.err
    assert "| 0.1 | h2o |" in done.out and "2 cells: done in" in done.err
    assert sorted(p.name for p in Path("sweep").iterdir()) == [
        "cells",
        "pareto.png",
        "settings.json",
        "sheet.png",
        "sweep.json",
        "sweep.md",
    ]

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssd_export.sweep.sweep.run_sweep", interrupt)
    Path("sweep/sweep.md").unlink()
    done = run(*args, "--num-scenes", 1)
    assert (
        done.code == 130
        and "so far: sweep/sweep.json, sweep/sweep.md" in done.err
        and Path("sweep/sweep.md").is_file()
    )
    done = run(*args, "--num-scenes", 1, "--out", "other")
    assert done.code == 130 and "holds nothing yet of the full cache" in done.err


BAD_VALUES = [
    ("eval", "--num-prompts", "0", "use 300"),
    ("eval", "--budget", "2", "use 0.2"),
    ("eval", "--batch", "0", "use 1 to 4096"),
    ("eval", "--seed", "-1", "use a number such as 0"),
    ("eval", "--bundle", "b", "--policy", "h2o", "drop one"),
    ("eval", "--sheet", "s.jpg", "use s.png"),
    ("eval", "run `ssd-export export`"),
    ("eval", "--model", "nowhere", "no checkpoint at nowhere"),
    ("verify", "run `ssd-export export`"),
    ("verify", "--bundle", "nowhere", "no bundle at nowhere"),
    ("verify", "--seed", "-1", "use a number such as 0"),
    ("sweep", "--budgets", "much", "use 0.1,0.2,0.5"),
    ("sweep", "--policies", "h3o", "choose from full"),
    ("sweep", "--num-prompts", "-1", "use 300, or 0 for the teacher-forced loss alone"),
    ("sweep", "--policies", "h2o@much", "write h2o@evict-every=24"),
    ("bench", "--batch", "two", "use 1,8,32"),
    ("bench", "--bundle", "nowhere", "no bundle at nowhere"),
]


@pytest.mark.parametrize("case", BAD_VALUES, ids=[" ".join(case[:-1]) for case in BAD_VALUES])
def test_a_bad_value_is_one_line_with_the_fix(
    run: Run, tmp_path: Path, case: tuple[str, ...]
) -> None:
    *args, fix = case
    done = run(*args)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and fix in done.err
    assert list(tmp_path.iterdir()) == []


def test_every_option_names_its_default(run: Run) -> None:
    for verb in ("eval", "sweep", "verify"):
        for option in run(verb, "--help").out.split("Options:")[1].split("\n  --")[1:]:
            assert "[default:" in option or option.startswith(("json", "help")), option
