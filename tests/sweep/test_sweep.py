"""A sweep runs what is missing, compares case by case and says what it could not measure."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.write_documents import Measurements
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.menu import menu
from ssd_export.report.measurement import publish, read_measurement
from ssd_export.sweep import sweep
from ssd_export.sweep.cells import images_of, side_by_side
from ssd_export.sweep.jobs import settle_jobs
from ssd_export.sweep.plot import _PANELS, _far_below, plot, spread
from ssd_export.sweep.report import markdown, summary, write_report
from ssd_export.sweep.spec import Part, SweepSpec, check_spec
from ssd_export.sweep.sweep import finished_part, run_sweep
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

pytestmark = pytest.mark.slow


def spec_of(model: Path, out: Path, **changes: object) -> SweepSpec:
    spec = SweepSpec(
        str(model),
        ("full", "ssd-row", "ssd-auto"),
        (0.1, 1.0),
        num_prompts=4,
        seeds=2,
        num_scenes=2,
        batch=4,
        runner="ort",
        provider="cpu",
        cfg_scale=None,
        temperature=None,
        head_map=None,
        out=out,
    )
    return replace(spec, **changes)


def test_grid_rows_in_parallel_are_no_mode_of_a_sweep(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"benchmarks\.zipar"):
        run_sweep(spec_of(checkpoint, tmp_path / "zipar", lookahead=("zipar:8",), num_prompts=2))


def test_lookahead_is_measured_beside_single_steps(checkpoint: Path, tmp_path: Path) -> None:
    spec = spec_of(
        checkpoint,
        tmp_path / "s",
        policies=("h2o@lookahead=8",),
        budgets=(0.2,),
        num_prompts=2,
        seeds=1,
        num_scenes=1,
        lookahead=(4, "auto"),
    )
    result = run_sweep(spec)
    for cell in result.cells:
        off, four, auto = cell["lookahead"]
        assert [mode["mode"] for mode in (off, four, auto)] == ["off", "4", "auto"]
        assert off["passes"] == 575 and off["tokens_a_pass"] == 1 and off["times_faster"] == 1
        assert 575 / 4 <= four["passes"] < 575
        assert four["tokens_a_pass"] == pytest.approx(575 / four["passes"])
        for mode in (off, four, auto):
            assert mode["images"] == 2 and mode["same_tokens"] == 2
            assert mode["ms_per_token"] > 0 and mode["cpu_ms_per_token"] > 0
    text = write_report(spec, result)[1].read_text()
    assert "| 0.2 | h2o@lookahead=8 | 4 | 2 | 2 |" in text and "tokens a pass" in text
    with pytest.raises(UserError, match="another lookahead"):
        run_sweep(replace(spec, lookahead=(8,)))
    run_sweep(replace(spec, lookahead=()))  # nothing is left to measure


def test_cells_of_a_spec(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tmp_path, policies=("h2o", "full", "tova"), budgets=(0.1, 1.0, 0.2))
    assert spec.cells() == [("full", 1.0), ("h2o", 0.1), ("h2o", 0.2), ("tova", 0.1), ("tova", 0.2)]


def test_a_sweep_of_a_scored_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    spec = spec_of(checkpoint, tmp_path / "s", policies=("full", "ssd-row"))
    result = run_sweep(spec, lambda *args: told.append(args))
    full, row = result.cells
    assert (full["policy"], row["policy"], row["budget"]) == ("full", "ssd-row", 0.1)
    assert (
        len(row["ok"]) == 8
        and len(row["losses"]) == 2
        and row["tokens_evicted_per_image"] > 0 == full["tokens_evicted_per_image"]
    )
    assert row["cache_bytes_per_image"] < 0.3 * full["cache_bytes_per_image"]
    assert (
        told[-1][0] == "2 cells"
        and told[-1][1] == told[-1][2]
        and [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    )

    paths = write_report(spec, result)
    assert [path.name for path in paths] == ["sweep.json", "sweep.md", "pareto.png", "sheet.png"]
    rows = json.loads(paths[0].read_text())["rows"]
    difference = np.array(row["losses"]) - full["losses"]
    assert (
        rows[1]["ok"] == "0" * 8
        and rows[1]["seeds"] == [0, 1]
        and rows[1]["categories"]["relation"]["total"] == 2
    )
    assert rows[1]["loss_above_full"]["mean"] == pytest.approx(difference.mean())
    assert rows[1]["loss_above_full"]["standard_error"] == pytest.approx(
        difference.std(ddof=1) / 2**0.5
    )
    table = [line for line in paths[1].read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and table[3].startswith(
        "| 0.1 | ssd-row | 0.0 (0.0 to 32.4)"
    )
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.width > 400

    publish(
        tmp_path / "sweep.json", "python cli.py sweep", json.loads(paths[0].read_text()), paths[2:]
    )
    measured = read_measurement(tmp_path / "sweep.json")
    assert measured is not None and table[3] in Measurements(tmp_path).text("sweep")
    assert (tmp_path / "sweep-pareto.png").read_bytes() == paths[2].read_bytes()

    monkeypatch.setattr(
        sweep.CellRunner, "__call__", lambda *args: pytest.fail("a finished part was run again")
    )
    assert run_sweep(spec).cells == result.cells == finished_part(spec).cells
    fewer = run_sweep(replace(spec, seeds=1)).cells[
        1
    ]  # seeds may be added and left out, and are compared where both are
    assert fewer["ok"] == row["ok"][:4] and fewer["seeds"] == [0]
    with pytest.raises(UserError, match="another num_prompts .4, now 5.; choose another --out"):
        run_sweep(replace(spec, num_prompts=5))


def test_a_sweep_of_any_other_model_compares_with_its_full_cache(tmp_path: Path) -> None:
    write_transformers_checkpoint(tmp_path / "m", TinyJanus(num_layers=1))
    spec = spec_of(
        tmp_path / "m", tmp_path / "s", policies=("h2o", "ssd-row"), seeds=1, num_prompts=2
    )
    result = run_sweep(spec)
    assert (
        list(result.skipped) == ["ssd-row-b0.1"] and "calibrate" in result.skipped["ssd-row-b0.1"]
    )
    h2o = result.cells[1]
    assert (
        len(h2o["token_agreement"]) == len(h2o["psnr"]) == len(h2o["kl"]) == 2
        and min(h2o["kl"]) > 0
    )
    paths = write_report(spec, result)
    assert (
        "| 0.1 | h2o | 0." in paths[1].read_text()
        and "Not measured: ssd-row-b0.1" in paths[1].read_text()
    )


def test_variants_and_the_loss_alone(checkpoint: Path, tmp_path: Path) -> None:
    """No captions: nothing is exported or generated, so the control without a limit on groups has a
    row too.
    """
    config = open_checkpoint(checkpoint).config
    options = menu(config.grid)
    shape = (config.num_layers, config.num_kv_heads, len(options))
    costs = np.random.default_rng(1).random(shape) * (1 - np.arange(len(options)) / len(options))
    head_map = replace(
        HeadMap.load(checkpoint / "head_map.json"), cost_options=options, costs=costs.tolist()
    )
    head_map.save(tmp_path / "map.json")
    names = (
        "ssd-auto",
        "ssd-auto@groups=1",
        "ssd-auto@groups=unlimited",
        "h2o@evict-every=24",
        "streaming-llm@num-sinks=4",
        "ssd-row@head-map=random:3",
    )
    spec = spec_of(
        checkpoint,
        tmp_path / "s",
        policies=names,
        num_prompts=0,
        head_map=str(tmp_path / "map.json"),
    )
    result = run_sweep(spec)
    assert [cell["policy"] for cell in result.cells] == ["full", *names] and not result.skipped
    assert all(len(cell["losses"]) == 2 and "ok" not in cell for cell in result.cells)
    assert len({tuple(cell["losses"]) for cell in result.cells}) == 7
    paths = write_report(spec, result)
    assert [path.name for path in paths] == ["sweep.json", "sweep.md", "pareto.png"]
    assert "| 0.1 | ssd-auto@groups=unlimited | - | - |" in paths[1].read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "cells").iterdir()}
    replace(head_map, costs=costs[:, ::-1].tolist()).save(tmp_path / "map.json")
    again = run_sweep(spec)
    anew = {
        path.name.split("-b")[0] for path, then in before.items() if path.stat().st_mtime_ns != then
    }
    assert anew == {
        "ssd-auto",
        "ssd-auto@groups=unlimited",
    }  # one option for all heads is the same in any order of heads
    assert [cell["policy"] for cell in again.cells] == ["full", *names]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json"):
        run_sweep(
            spec_of(
                checkpoint, tmp_path / "bad", num_prompts=0, head_map=str(tmp_path / "bad.json")
            )
        )
    write_transformers_checkpoint(tmp_path / "m", TinyJanus(num_layers=1))
    with pytest.raises(UserError, match="is compared by what it generates; use 300"):
        run_sweep(spec_of(tmp_path / "m", tmp_path / "t", num_prompts=0))


def test_what_matters_most_comes_first(tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path,
        tmp_path,
        policies=("tova", "h2o", "ssd-auto", "ssd-auto@groups=unlimited"),
        budgets=(0.1, 0.5, 0.2),
    )
    parts = spec.parts(scored=True)
    assert len(set(parts)) == len(parts) == 13 + 2 * 10
    names = [part.file(tmp_path).stem for part in parts]
    assert names[:6] == [
        "full-b1-seed0",
        "full-b1-loss",
        "ssd-auto-b0.2-seed0",
        "ssd-auto-b0.2-loss",
        "h2o-b0.2-seed0",
        "h2o-b0.2-loss",
    ]
    assert [part.seed for part in parts[-10:]] == [1] * 10 and names[-10] == "full-b1-seed1"
    assert "full-b1-loss" not in [part.file(tmp_path).stem for part in spec.parts(scored=False)]


def test_an_interrupted_part_is_absent_and_what_was_finished_makes_a_table(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = sweep.CellRunner._generated

    def interrupt(self: sweep.CellRunner, part: Part, *rest: object) -> dict[str, object]:
        if part.policy == "h2o":
            raise KeyboardInterrupt
        return generated(self, part, *rest)

    monkeypatch.setattr(sweep.CellRunner, "_generated", interrupt)
    spec = spec_of(checkpoint, tmp_path / "s", policies=("full", "h2o"), num_prompts=1)
    with pytest.raises(UserError, match="holds nothing yet of the full cache"):
        write_report(spec, finished_part(spec))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec)
    left = finished_part(spec)
    assert [cell["policy"] for cell in left.cells] == ["full"] and left.cells[0]["seeds"] == [0]
    assert "With fewer seeds: full 1." in write_report(spec, left)[1].read_text()
    assert not list((tmp_path / "s" / "cells").glob("h2o*"))


def test_a_failing_part_is_named_and_the_others_are_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: sweep.CellRunner, policy: str, table: object) -> dict[str, object]:
        if policy == "h2o":
            raise MemoryError("too much")
        return {"losses": [0.1, 0.2], "kl": [0.0, 0.0]}

    monkeypatch.setattr(sweep.CellRunner, "_teacher_forced", fail)
    spec = spec_of(checkpoint, tmp_path / "s", policies=("h2o", "tova"), num_prompts=0)
    result = run_sweep(spec)
    assert result.failed == {"h2o-b0.1-loss": "MemoryError: too much"} and not result.skipped
    assert [cell["policy"] for cell in result.cells] == ["full", "tova"]
    assert (
        "Not measured: h2o-b0.1-loss: MemoryError: too much"
        in write_report(spec, result)[1].read_text()
    )


def test_two_processes_measure_what_one_does(checkpoint: Path, tmp_path: Path) -> None:
    spec = spec_of(
        checkpoint, tmp_path / "one", policies=("h2o", "ssd-auto"), num_prompts=2, seeds=1, batch=1
    )
    told: list[tuple[str, int, int]] = []
    one = run_sweep(spec)
    two = run_sweep(replace(spec, out=tmp_path / "two", jobs=2), lambda *args: told.append(args))
    assert (
        two.skipped.keys() == one.skipped.keys() == {"ssd-auto-b0.1"}
    )  # refused in another process, in the same words
    assert two.skipped == one.skipped and not two.failed
    for first, second in zip(one.cells, two.cells, strict=True):
        assert first["ok"] == second["ok"] and first["losses"] == pytest.approx(
            second["losses"], abs=1e-6
        )
        name = f"cells/{first['policy']}-b{first['budget']:g}-seed0.npz"
        with np.load(tmp_path / "one" / name) as tokens, np.load(tmp_path / "two" / name) as others:
            assert (tokens["arr_0"] == others["arr_0"]).all()
    assert two.cells[0]["jobs"] == 2 and told[-1][1] == told[-1][2]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_paired_differences_are_narrower_than_the_interval_of_the_score() -> None:
    ok = [1] * 280 + [0] * 20
    worse = [0] * 6 + ok[6:]
    common = {"policy": "h2o", "budget": 0.2, "losses": [0.1, 0.2], "seeds": [0]}
    row = summary({**common, "ok": worse}, {**common, "ok": ok}, {0: ["single"] * 300})
    assert row["score_above_full"]["mean"] == pytest.approx(-0.02)
    assert (
        1.96 * row["score_above_full"]["standard_error"]
        < (row["score"]["high"] - row["score"]["low"]) / 3
    )


def test_one_prompt_gives_a_table_without_a_number_for_the_error() -> None:
    row = {
        "policy": "h2o",
        "budget": 0.1,
        "image_slots_mean": 57,
        "cache_bytes_per_image": 9,
        "ms_per_token": 1.0,
        "kl": {"mean": 0.5, "standard_error": None},
    }
    settings = dict(
        measure="agreement",
        model="m",
        model_fingerprint="f" * 64,
        num_prompts=1,
        seeds=1,
        batch=1,
        runner="ort",
        provider="cpu",
        machine="m",
        tool_version="0",
    )
    assert "| 500.000 |" in markdown({"settings": settings, "rows": [row], "skipped": {}})


def test_images_come_out_of_a_strip_as_they_went_in() -> None:
    images = [Image.new("RGB", (48, 48), (i, 0, 0)) for i in range(3)]
    assert [image.getpixel((5, 5)) for image in images_of(side_by_side(images))] == [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
    ]


def test_names_of_a_plot_stand_apart_and_in_order() -> None:
    assert spread([0.2, 0.5, 0.9], 0.1) == [0.2, 0.5, 0.9]
    moved = spread([0.0, 0.5, 0.51, 0.52, 1.0], 0.1)
    gaps = np.diff(moved)
    assert (
        gaps.min() >= 0.1 - 1e-9
        and moved[2] == pytest.approx(0.51)
        and moved[0] >= 0.05
        and moved[-1] <= 0.95 + 1e-9
    )
    assert np.diff(spread([0.5] * 40, 0.1)).min() == pytest.approx(1 / 40)


def test_a_policy_far_below_is_named_and_not_run() -> None:
    def row(policy: str, budget: float, share: float) -> dict[str, object]:
        score = {"share": share, "low": share - 0.01, "high": share + 0.01}
        return {
            "policy": policy,
            "budget": budget,
            "image_slots_mean": 576 * budget,
            "score": score,
        }

    rows = [
        row("full", 1.0, 0.9),
        row("h2o", 0.1, 0.3),
        row("h2o", 0.2, 0.8),
        row("tova", 0.1, 0.0),
        row("tova", 0.2, 0.2),
    ]
    assert _far_below(_PANELS[0], rows) == ["tova"] and _far_below(_PANELS[1], rows) == []
    plot(rows, file := BytesIO())
    assert Image.open(file).width > 800


def test_jobs_follow_cores_memory_and_the_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.runtime import small_models
    from ssd_export.sweep import jobs as sweep_jobs

    opened = open_checkpoint(checkpoint)
    monkeypatch.setattr(sweep_jobs, "num_cpus", lambda: 8)
    each = sweep_jobs.process_bytes(opened, 4)
    assert 350e6 < each < 1e9
    monkeypatch.setattr(sweep_jobs, "free_bytes", lambda: 3 * each)
    assert (
        settle_jobs(None, opened, 4, on_cpu=True) == 3
        and settle_jobs(None, opened, 4, on_cpu=False) == 1
    )
    assert settle_jobs(2, opened, 4, on_cpu=True) == 2
    with pytest.raises(
        UserError, match="--jobs 4 takes about .* use --jobs 3, or a smaller --batch than 4"
    ):
        settle_jobs(4, opened, 4, on_cpu=True)
    monkeypatch.setattr(small_models, "SMALL_HIDDEN_SIZE", 1)
    assert settle_jobs(None, opened, 4, on_cpu=True) == 1


@pytest.mark.parametrize(
    "changes, fix",
    [
        (dict(policies=("h3o",)), "choose from full"),
        (dict(policies=()), "choose from full"),
        (dict(budgets=(0.0,)), "use 0.1,0.2"),
        (dict(budgets=()), "use 0.1,0.2"),
        (dict(seeds=0), "--seeds 0"),
        (dict(jobs=0), "--jobs 0"),
        (dict(num_prompts=-1), "use 300, or 0"),
        (dict(policies=("h2o@evict-every",)), "is not KEY=VALUE"),
        (dict(policies=("h2o@speed=3",)), "with a key of window, evict-every"),
        (dict(policies=("h2o@num-recent=many",)), "wants a whole number, not 'many'"),
        (dict(policies=("ssd-auto@groups=4",)), "outside 1..3; use groups=3 or unlimited"),
        (dict(lookahead=(8,), num_prompts=0), "--lookahead generates images; use --num-prompts"),
        (dict(policies=("h2o@lookahead=0",)), "lookahead=0 is below 1; use lookahead=1 or more"),
        (dict(policies=("h2o@groups=unlimited",)), "only ssd-auto, with nothing else"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, object], fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        check_spec(spec_of(tmp_path, tmp_path, **changes))
