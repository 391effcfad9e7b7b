"""A sweep runs what is missing, compares case by case and says what it could not measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_export.cache.head_map import HeadMap
from ssd_export.calibrate.menu import MENU
from ssd_export.errors import UserError
from ssd_export.evaluate import sweep
from ssd_export.evaluate.measurement import publish, read_measurement
from ssd_export.evaluate.sweep import run_sweep
from ssd_export.evaluate.sweep_cells import pictures_of, side_by_side
from ssd_export.evaluate.sweep_report import markdown, summary, write_report
from ssd_export.evaluate.sweep_spec import SweepSpec, check_spec
from ssd_export.evaluate.write_benchmarks import Measurements
from ssd_export.model.checkpoint import open_checkpoint
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint


def spec_of(model: Path, out: Path, **changes: object) -> SweepSpec:
    spec = SweepSpec(str(model), ("full", "ssd-row", "ssd-auto"), (0.1, 1.0), num_prompts=4, seeds=2, num_scenes=2, batch=4,
                     runner="ort", provider="cpu", cfg_scale=None, temperature=None, head_map=None, out=out)  # fmt: skip
    return replace(spec, **changes)


def test_cells_of_a_spec(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tmp_path, policies=("h2o", "full", "tova"), budgets=(0.1, 1.0, 0.2))
    assert spec.cells() == [("full", 1.0), ("h2o", 0.1), ("h2o", 0.2), ("tova", 0.1), ("tova", 0.2)]


def test_a_sweep_of_a_scored_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    spec = spec_of(checkpoint, tmp_path / "s", policies=("full", "ssd-row"))
    result = run_sweep(spec, lambda *args: told.append(args))
    full, row = result.cells
    assert (full["policy"], row["policy"], row["budget"]) == ("full", "ssd-row", 0.1)
    assert len(row["ok"]) == 8 and len(row["losses"]) == 2 and row["tokens_dropped_per_image"] > 0 == full["tokens_dropped_per_image"]
    assert row["cache_bytes_per_image"] < 0.3 * full["cache_bytes_per_image"]
    assert told[-1] == ("2 cells", 96, 96) and [done for _, done, _ in told] == sorted(done for _, done, _ in told)

    paths = write_report(spec, result)
    assert [path.name for path in paths] == ["sweep.json", "sweep.md", "pareto.png", "sheet.png"]
    rows = json.loads(paths[0].read_text())["rows"]
    difference = np.array(row["losses"]) - full["losses"]
    assert rows[1]["loss_above_full"]["mean"] == pytest.approx(difference.mean())
    assert rows[1]["loss_above_full"]["standard_error"] == pytest.approx(difference.std(ddof=1) / 2**0.5)
    table = paths[1].read_text().splitlines()
    assert len({line.count("|") for line in table[:4]}) == 1 and table[3].startswith("| ssd-row | 0.1 | 0.0 (0.0 to 32.4)")
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.width > 400

    publish(tmp_path / "sweep.json", "python cli.py sweep", json.loads(paths[0].read_text()), paths[2:])
    measured = read_measurement(tmp_path / "sweep.json")
    assert measured is not None and table[3] in Measurements(tmp_path).text("sweep")
    assert (tmp_path / "sweep-pareto.png").read_bytes() == paths[2].read_bytes()

    monkeypatch.setattr(sweep.CellRunner, "run", lambda *args: pytest.fail("a finished cell was run again"))
    assert run_sweep(spec).cells == result.cells
    assert run_sweep(replace(spec, policies=("ssd-auto",))).cells[0] == full
    with pytest.raises(UserError, match="another num_prompts .4, now 5.; choose another --out"):
        run_sweep(replace(spec, num_prompts=5))


def test_a_sweep_of_any_other_model_compares_with_its_full_cache(tmp_path: Path) -> None:
    write_transformers_checkpoint(tmp_path / "m", TinyJanus(num_layers=1))
    spec = spec_of(tmp_path / "m", tmp_path / "s", policies=("h2o", "ssd-row"), seeds=1, num_prompts=2)
    result = run_sweep(spec)
    assert list(result.skipped) == ["ssd-row-b0.1"] and "calibrate" in result.skipped["ssd-row-b0.1"]
    h2o = result.cells[1]
    assert len(h2o["token_agreement"]) == len(h2o["psnr"]) == len(h2o["kl"]) == 2 and min(h2o["kl"]) > 0
    paths = write_report(spec, result)
    assert "| h2o | 0.1 | 0." in paths[1].read_text() and "Not measured: ssd-row-b0.1" in paths[1].read_text()


def test_variants_and_the_loss_alone(checkpoint: Path, tmp_path: Path) -> None:
    """No captions: nothing is exported or drawn, so the control without a limit on groups has a row too."""
    config = open_checkpoint(checkpoint).config
    costs = np.random.default_rng(1).random((config.num_layers, config.num_kv_heads, len(MENU))) * (1 - np.arange(len(MENU)) / len(MENU))
    head_map = replace(HeadMap.load(checkpoint / "head_map.json"), cost_options=MENU, costs=costs.tolist())
    head_map.save(tmp_path / "map.json")
    names = ("ssd-auto", "ssd-auto@groups=1", "ssd-auto@groups=unlimited", "h2o@evict-every=24", "streaming-llm@num-sinks=4",
             "ssd-row@head-map=random:3")  # fmt: skip
    spec = spec_of(checkpoint, tmp_path / "s", policies=names, num_prompts=0, head_map=str(tmp_path / "map.json"))
    result = run_sweep(spec)
    assert [cell["policy"] for cell in result.cells] == ["full", *names] and not result.skipped
    assert all(len(cell["losses"]) == 2 and "ok" not in cell for cell in result.cells)
    assert len({tuple(cell["losses"]) for cell in result.cells}) == 7
    paths = write_report(spec, result)
    assert [path.name for path in paths] == ["sweep.json", "sweep.md", "pareto.png"]
    assert "| ssd-auto@groups=unlimited | 0.1 | - | - |" in paths[1].read_text()
    with pytest.raises(UserError, match="another head_map_hash"):
        head_map.random(0).save(tmp_path / "map.json")
        run_sweep(spec)
    write_transformers_checkpoint(tmp_path / "m", TinyJanus(num_layers=1))
    with pytest.raises(UserError, match="is compared by what it draws; use 300"):
        run_sweep(spec_of(tmp_path / "m", tmp_path / "t", num_prompts=0))


def test_an_interrupted_cell_is_absent(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.CellRunner, "_teacher_forced", interrupt)
    spec = spec_of(checkpoint, tmp_path / "s", policies=("full",), seeds=1, num_prompts=1)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec)
    assert list((tmp_path / "s" / "cells").iterdir()) == []


def test_paired_differences_are_narrower_than_the_interval_of_the_score() -> None:
    ok = [1] * 280 + [0] * 20
    worse = [0] * 6 + ok[6:]
    common = {"policy": "h2o", "budget": 0.2, "losses": [0.1, 0.2]}
    row = summary({**common, "ok": worse}, {**common, "ok": ok})
    assert row["score_above_full"]["mean"] == pytest.approx(-0.02)
    assert 1.96 * row["score_above_full"]["standard_error"] < (row["score"]["high"] - row["score"]["low"]) / 3


def test_one_prompt_gives_a_table_without_a_number_for_the_error() -> None:
    row = {"policy": "h2o", "budget": 0.1, "image_slots_mean": 57, "cache_bytes_per_image": 9, "ms_per_token": 1.0,
           "kl": {"mean": 0.5, "standard_error": None}}  # fmt: skip
    settings = dict(measure="agreement", model="m", model_fingerprint="f" * 64, num_prompts=1, seeds=1, batch=1, runner="ort",
                    provider="cpu", machine="m", tool_version="0")  # fmt: skip
    assert "0.50000 ± nan" in markdown({"settings": settings, "rows": [row], "skipped": {}})


def test_pictures_come_out_of_a_strip_as_they_went_in() -> None:
    images = [Image.new("RGB", (48, 48), (i, 0, 0)) for i in range(3)]
    assert [image.getpixel((5, 5)) for image in pictures_of(side_by_side(images))] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize(
    "changes, fix",
    [
        (dict(policies=("h3o",)), "choose from full"),
        (dict(policies=()), "choose from full"),
        (dict(budgets=(0.0,)), "use 0.1,0.2"),
        (dict(budgets=()), "use 0.1,0.2"),
        (dict(seeds=0), "--seeds 0"),
        (dict(num_prompts=-1), "use 300, or 0"),
        (dict(policies=("h2o@evict-every",)), "is not KEY=VALUE"),
        (dict(policies=("h2o@speed=3",)), "with a key of window, evict-every"),
        (dict(policies=("h2o@num-recent=many",)), "wants a whole number, not 'many'"),
        (dict(policies=("ssd-auto@groups=4",)), "outside 1..3; use groups=3 or unlimited"),
        (dict(policies=("h2o@groups=unlimited",)), "only ssd-auto, with nothing else"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, object], fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        check_spec(spec_of(tmp_path, tmp_path, **changes))
