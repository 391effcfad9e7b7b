"""The class-conditional demo model on the command line: head map, bundle, images, proofs, speed and
comparison, with untrained weights in the trained ones' place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ssd_export.demo.classes import class_names
from ssd_export.model.find import CLASS_DEMO, DEMOS
from tests.class_demos import write_untrained

Run = Callable[..., SimpleNamespace]
pytestmark = pytest.mark.slow
MAX_BYTES = 6_000_000  # what the wheel may grow by


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("demo") / "class_checkpoint")


@pytest.fixture(autouse=True)
def installed(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model demo-classes` is the untrained model."""
    monkeypatch.setitem(DEMOS, CLASS_DEMO, untrained)


def test_the_checkpoint_is_small_enough_for_the_wheel(untrained: Path) -> None:
    assert sum(path.stat().st_size for path in untrained.iterdir()) < MAX_BYTES


def test_from_head_map_to_proofs(run: Run, untrained: Path, tmp_path: Path) -> None:
    done = run(
        "calibrate", "--model", CLASS_DEMO, "--num-images", 1, "--costs", "fisher", "--out",
        untrained / "head_map.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = run("export", "--model", CLASS_DEMO, "--budget", 0.2)
    assert done.code == 0, done.err
    bundle = tmp_path / done.out.splitlines()[-1]
    assert bundle.name == "demo-classes-ssd-auto-b0.2-fp32"

    name, number = class_names()[5], 5
    drawn = []
    for asked in ((name,), ("--class", name), ("--class", number)):
        done = run("generate", *asked, "--out", "one.png", "--save-tokens", "one.npy")
        assert done.code == 0, done.err
        assert "never seen" not in done.err
        drawn.append(np.load("one.npy"))
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == drawn[2]).all()
    with Image.open("one.png") as image:
        assert image.size == (96, 96)

    verified = run("verify", "--bundle", bundle, "--level", "layers", "--json")
    report = json.loads(verified.out)
    assert verified.code == 0 and report["against"] == "checkpoint", verified.err

    done = run(
        "bench", "--bundle", bundle, "--baselines", "full", "--steps", 24, "--rounds", 0,
        "--threads", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out)["results"]["rows"]
    assert {row["policy"] for row in rows} == {"ssd-auto", "full"}

    done = run("eval", "--bundle", bundle, "--num-prompts", 2, "--json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["categories"]) == {"single", "counting"}


def test_sweep_compares_policies_on_scenes_of_classes(
    run: Run, untrained: Path, tmp_path: Path
) -> None:
    command = (
        "sweep", "--model", CLASS_DEMO, "--policies", "streaming-llm", "--budgets", "0.1",
        "--num-prompts", 2, "--num-scenes", 2, "--seeds", 1, "--jobs", 1, "--out", "sweep",
    )  # fmt: skip
    done = run(*command)
    assert done.code == 0, done.err
    assert "single" in done.out and "relation" not in done.out
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["full", "streaming-llm"]
    assert all("score" in row and row["kl"]["mean"] >= 0 for row in rows)
    assert rows[1]["kl"]["mean"] > 0
    assert run(*command).code == 0  # what is finished is read again
