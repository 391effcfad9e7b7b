"""bench: the figures of a row, its bounds and baselines, what a child process says, and what is
refused.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from ssd_export.bench import bench, whole_images
from ssd_export.bench import process as bench_process
from ssd_export.bench.bench import (
    _bounds,
    _checkpoint,
    _ratios,
    kind_of,
    run_bench,
)
from ssd_export.bench.cell import Cell, _batches, image_figures, measure, time_steps, timed_parts
from ssd_export.bench.full_cache_bundle import full_twin
from ssd_export.bench.process import run_cell
from ssd_export.bench.profile import summarise
from ssd_export.bench.report import bench_figures, bench_tables, roofline_note
from ssd_export.bench.roofline import MachineRates, StepCost, step_cost
from ssd_export.bench.spec import BenchSpec, check_spec
from ssd_export.bench.whole_images import ImageRounds, measure_images
from ssd_export.bundle import Precision, open_bundle
from ssd_export.cli.bench import command_line
from ssd_export.errors import UserError
from ssd_export.export.source_checkpoint import checkpoint_like, is_of
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.policy.schedule import eviction_steps
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

pytestmark = pytest.mark.slow

TINY = TinyJanus()
RATES = MachineRates(
    read_bandwidth=10e9, copy_bandwidth=20e9, matrix_rate=1e12, dtype="float32", threads=1
)


def compressed() -> Path:
    return bundle(checkpoint(TINY), "h2o", 0.2, evict_every=24)


def test_a_run_with_the_full_cache_as_baseline() -> None:
    told: list[str] = []
    spec = BenchSpec(
        (compressed(),),
        batches=(1, 2),
        baselines=("full",),
        steps=30,
        model=str(checkpoint(TINY)),
        profile=True,
        rounds=3,
    )
    results = run_bench(spec, lambda stage, done, total: told.append(stage))
    assert [(row["policy"], row["batch"]) for row in results["rows"]] == [
        ("h2o", 1),
        ("full", 1),
        ("h2o", 2),
        ("full", 2),
    ]
    for row in results["rows"]:
        assert (
            row["steps"] == 30
            and 0 < row["ms_per_token"] <= row["ms_per_token_p95"]
            and row["first_token_ms"] > 0
        )
        assert (
            row["image_tokens_per_second"]
            <= 1.01 * 1000 * row["batch"] / min(row["ms_per_token"], row["ms_per_token_p95"]) * 30
        )
        assert row["ratio_to_transformers"] is None and row["peak_resident_bytes"] > 20 << 20
        assert row["share_of_read_bound"] > 0 and sum(
            entry["share"] for entry in row["profile"]
        ) == pytest.approx(1)
    first, full = results["rows"][:2]
    assert first["step_ratio_to_full"] == pytest.approx(
        full["cpu_ms_per_token"] / first["cpu_ms_per_token"]
    )
    by_round = [
        theirs / own
        for theirs, own in zip(full["batch_cpu_seconds"], first["batch_cpu_seconds"], strict=True)
    ]
    assert first["ratio_to_full"] == sorted(by_round)[1] and full["ratio_to_full"] == 1
    assert first["images_per_minute"] == pytest.approx(60 / sorted(first["batch_seconds"])[1])
    assert first["cache_bytes"] < 0.35 * full["cache_bytes"]
    assert "h2o 0.2, fp32, batch 2" in told and "bandwidth and matrix rate" in told

    tables = bench_tables(json.loads(json.dumps(results)))
    assert [table["title"] for table in tables[:3]] == [
        "Speed",
        "Memory",
        "Share of the roofline",
    ] and len(tables) == 7
    ratio = tables[0]["columns"].index("times transformers")
    assert {row[ratio] for row in tables[0]["rows"]} == {"not run"}
    assert bench_figures(results)["full-fp32-1-times_full_cache"] == "1.00"


def test_transformers_is_timed_token_by_token() -> None:
    cell = Cell("transformers", checkpoint(TINY), "ort", "cpu", batch=2, steps=5, threads=1)
    told: list[int] = []
    facts = measure(cell, lambda done, total: told.append(done))
    assert (
        facts["steps"] == 5
        and facts["ms_per_token"] > 0
        and facts["images_per_minute"] > 0
        and told[-1] == 5
    )


def test_transformers_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"ssd-export\[bench\]\", or use --baselines full"):
        check_spec(BenchSpec(()))  # before anything is measured
    assert check_spec(BenchSpec((), baselines=("full",))).baselines == ("full",)
    with pytest.raises(UserError, match=r"ssd-export\[bench\]"):
        measure(
            Cell("transformers", checkpoint(TINY), "ort", "cpu", 1, 1, 1), lambda done, total: None
        )


def test_the_twin_generates_what_the_full_cache_generates() -> None:
    prompts, options = ["a red circle", "blue"], dict(seed=3, cfg_scale=2.0)
    before = sorted(compressed().parent.iterdir())
    with full_twin(open_bundle(compressed()), open_checkpoint(checkpoint(TINY))) as twin:
        assert os.path.samefile(
            twin.path / "onnx/weights.safetensors", compressed() / "onnx/weights.safetensors"
        )
        with ImageGenerator.from_bundle(twin.path) as generator:
            found = generator(prompts, **options)
    assert sorted(compressed().parent.iterdir()) == before
    with ImageGenerator.from_bundle(bundle(checkpoint(TINY), "full", 1.0)) as generator:
        wanted = generator(prompts, **options)
    assert (found.tokens == wanted.tokens).all() and found.cache == wanted.cache


def test_opening_a_graph_again_counts_once_an_image() -> None:
    facts = {"first_token_ms": 4000.0, "image_tokens_per_second": 20.0, "first_step_seconds": 2.5}
    cell = Cell("bundle", None, "ort", "cpu", 2, 8, 1, image_seconds=8.0)
    seconds = 4.0 + 2.5 + 574 * 2 / 20 + 2 * 8.0
    assert image_figures(lambda: None, facts, cell, 576)["images_per_minute"] == pytest.approx(
        120 / seconds
    )
    del facts["first_step_seconds"]  # transformers: one step is as long as another
    assert image_figures(lambda: None, facts, cell, 576)["images_per_minute"] == pytest.approx(
        120 / (seconds - 2.5 + 0.1)
    )


class CountingRunner(Runner):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def prefill(self, batch: PromptBatch) -> None:
        self.calls.append(("prefill", 0))

    def evict(self, step: int) -> None:
        self.calls.append(("evict", step))

    def decode_step(self, step: int) -> None:
        self.calls.append(("step", step))


@pytest.mark.parametrize("steps", [50, 575])
def test_few_steps_evict_as_often_as_the_end_of_an_image(steps: int) -> None:
    opened, runner = open_bundle(compressed()), CountingRunner()
    cell = Cell("bundle", opened.path, "ort", "cpu", 1, steps, 1)
    batch, table = _batches(opened, cell)(), opened.config.policy
    loop = decode(runner, batch, table, timed_parts(cell, opened.config.model.grid))
    next(loop)
    grid = opened.config.model.grid
    times = time_steps(loop, runner, cell, grid, lambda done, total: None)
    assert len(times.seconds) == len(times.cpu_seconds) == steps and [
        step for what, step in runner.calls if what == "step"
    ] == list(range(576 - steps, 576))
    real = eviction_steps(table, batch.lengths.tolist())
    assert [step for what, step in runner.calls if what == "evict"] == sorted(
        s for s in real if s > 575 - steps
    )
    assert steps < 575 or real == {step for what, step in runner.calls if what == "evict"}


def test_bytes_and_operations_of_a_step_by_hand() -> None:
    opened = open_bundle(bundle(checkpoint(TINY), "full", 1.0))
    config = opened.config.model
    slots, rows = 32 + 576, 6
    caches = config.num_layers * config.num_kv_heads * rows * slots * (2 * config.head_dim * 4 + 4)
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = config.num_layers * (4 * hidden * hidden + 3 * hidden * inner)
    head = hidden * hidden + hidden * config.codebook_size
    aligner = config.codebook_dim * hidden + hidden * hidden
    attention = config.num_layers * config.num_heads * slots * 2 * config.head_dim
    cost = step_cost(opened, batch=3)
    assert cost.cache_bytes == caches
    assert cost.operations == 2 * (rows * (layers + head + attention) + 3 * aligner)
    vectors = 4 * (
        config.num_layers * 2 * hidden + hidden + hidden + config.codebook_size + 2 * hidden
    )  # norms and biases
    assert cost.weight_bytes == 4 * (layers + head + aligner) + vectors


def test_bounds_by_memory_and_by_arithmetic() -> None:
    memory = vars(StepCost(weight_bytes=8_000_000, cache_bytes=2_000_000, operations=1000))
    bounds = _bounds({"step_cost": memory, "compared_ms": 2.0}, RATES)
    assert (bounds["bound_ms_read"], bounds["bound_ms_copy"], bounds["limit"]) == (
        1.0,
        0.5,
        "memory",
    )
    assert bounds["share_of_read_bound"] == 0.5 and bounds["share_of_copy_bound"] == 0.25
    arithmetic = vars(StepCost(1000, 1000, operations=3_000_000_000))
    bounds = _bounds({"step_cost": arithmetic, "compared_ms": 6.0}, RATES)
    assert (bounds["bound_ms_read"], bounds["limit"]) == (3.0, "arithmetic")


def test_ratios_compare_equal_batches_and_precisions() -> None:
    def row(policy: str, kind: str, batch: int, ms: float) -> dict[str, object]:
        return {"policy": policy, "kind": kind, "batch": batch, "compared_ms": ms}

    rows = [
        row("ssd-row", "fp32", 1, 2.0),
        row("full", "fp32", 1, 6.0),
        row("full", "fp32-int4", 1, 3.0),
        row("full", "fp32", 8, 60.0),
        row("transformers", "fp32", 1, 20.0),
    ]
    steps = {"step_ratio_to_full": 3.0, "step_ratio_to_transformers": 10.0}
    assert _ratios(rows[0], rows) == steps | {"ratio_to_full": 3.0, "ratio_to_transformers": 10.0}
    alone = _ratios(rows[3], rows)
    assert alone["ratio_to_full"] == 1.0 and alone["ratio_to_transformers"] is None


def test_ratios_are_those_of_whole_images_round_by_round() -> None:
    """A machine that slows down between two rounds changes no ratio."""

    def row(policy: str, ms: float, seconds: list[float]) -> dict[str, object]:
        return dict(policy=policy, kind="fp32", batch=1, compared_ms=ms, compared_seconds=seconds)

    rows = [row("ssd-auto", 2.0, [1.0, 10.0, 2.0]), row("full", 3.0, [2.0, 20.0, 4.0])]
    found = _ratios(rows[0], rows)
    assert (found["ratio_to_full"], found["step_ratio_to_full"]) == (2.0, 1.5)


def test_whole_images_of_all_caches_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        whole_images,
        "_opened",
        lambda cell, stack: whole_images._Opened(lambda seed: order.append(str(cell.path))),
    )
    cells = tuple(Cell("bundle", Path(name), "ort", "cpu", 4, 1, 1) for name in "abc")
    told: list[tuple[int, int]] = []
    figures = measure_images(ImageRounds(cells, 3), lambda *done: told.append(done))
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"  # the first opens the graphs
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [len(one["batch_seconds"]) for one in figures] == [3, 3, 3]
    assert [one["image_rounds"] for one in figures] == [3, 3, 3]


def test_transformers_generates_whole_images() -> None:
    cell = Cell("transformers", checkpoint(TINY), "ort", "cpu", batch=2, steps=5, threads=1)
    with ExitStack() as stack:
        images = whole_images._opened(cell, stack).generate(0)
    assert images.shape[0] == 2 and images.shape[-1] == 3


def test_lookahead_is_measured_in_turns_with_single_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = bundle(checkpoint(TINY), "full", 1.0)
    cell = Cell("bundle", path, "ort", "cpu", batch=1, steps=1, threads=1)
    row = {"policy": "full", "budget": 1.0, "kind": "fp32", "batch": 1}
    monkeypatch.setattr(bench, "in_process", lambda work, *asked: work(*asked))
    (found,) = bench._with_images([row], ImageRounds((cell,), 1), ("auto", 8), lambda *told: None)
    assert found["image_rounds"] == 1 and "passes" not in found
    assert [one["lookahead"] for one in found["lookahead"]] == ["auto", 8]
    for one in found["lookahead"]:
        assert 72 <= one["passes"] <= 575 and one["times_faster"] > 0
        assert one["tokens_per_pass"] == pytest.approx(575 / one["passes"])
    settings = {"runner": "ort", "provider": "cpu", "threads": 1, "steps": 1}
    results = {"settings": settings, "rows": [], "lookahead": found["lookahead"]}
    table = next(one for one in bench_tables(results) if one["title"] == "Lookahead")
    assert [line[2] for line in table["rows"]] == ["auto", "8"]


def test_lookahead_needs_whole_images() -> None:
    with pytest.raises(UserError, match="--rounds 0 generates none"):
        check_spec(BenchSpec((), rounds=0, lookahead=(8,)))


def test_grid_rows_in_parallel_are_refused_where_caches_evict() -> None:
    path = bundle(checkpoint(TINY), "h2o")
    with pytest.raises(UserError, match="needs caches that keep everything"):
        bench.run_bench(BenchSpec((path,), lookahead=("zipar:8",)))


def test_a_profile_is_summed_by_operator(tmp_path: Path) -> None:
    def event(op: str, name: str, micros: int) -> dict[str, object]:
        return {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "dur": micros,
            "args": {"op_name": op},
        }

    step = [
        event("MatMul", "DecodeAttention_0_MatMul", 300),
        event("MatMul", "node_3", 500),
        event("Add", "a", 50),
        event("Add", "b", 50),
        {"name": "model_run", "cat": "Session", "dur": 1000},
    ]
    evict = [event("TopK", "t", 40), {"name": "model_run", "cat": "Session", "dur": 100}]
    files = {
        "decode_step": tmp_path / "d.json",
        "evict": tmp_path / "e.json",
        "prefill": tmp_path / "none.json",
    }
    files["decode_step"].write_text(json.dumps(step * 2))
    files["evict"].write_text(json.dumps(evict))
    found = {
        entry["operator"]: (entry["ms"], entry["calls"]) for entry in summarise(files, steps=2)
    }
    assert found == {
        "MatMul, weights": (0.5, 1),
        "MatMul, attention": (0.3, 1),
        "Add": (0.1, 2),
        "evict graph": (0.02, 0.5),
        "outside operators": (pytest.approx(0.13), 0),
    }


def test_a_child_that_is_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        exitcode = -9

        def __init__(self, target: object, args: tuple, daemon: bool) -> None:
            self._sender = args[-1]

        def start(self) -> None:
            self._sender.close()

        def join(self) -> None: ...

        def terminate(self) -> None: ...

    context = bench_process.multiprocessing.get_context("spawn")
    monkeypatch.setattr(context.__class__, "Process", Killed)
    with pytest.raises(UserError, match="want of memory; use a smaller --batch"):
        run_cell(Cell("bundle", Path("nowhere"), "ort", "cpu", 4, 1, 1), lambda done, total: None)


def test_an_error_of_a_child_is_the_parents() -> None:
    with pytest.raises(UserError, match="nowhere"):
        run_cell(Cell("bundle", Path("nowhere"), "ort", "cpu", 1, 1, 1), lambda done, total: None)


def test_kinds_and_commands() -> None:
    opened = open_bundle(compressed())
    assert kind_of(opened) == "fp32"
    int4 = replace(opened.config, precision=Precision("int4", "int8"))
    assert kind_of(replace(opened, config=int4)) == "fp32-int4"
    spec = BenchSpec((Path("a b"),), batches=(1, 8), baselines=("full",), steps=48, profile=True)
    assert (
        command_line(spec)
        == "python cli.py bench --bundle 'a b' --batch 1,8 --baselines full --steps 48 --profile"
    )
    assert command_line(BenchSpec((Path("x"),))) == "python cli.py bench --bundle x"


@pytest.mark.parametrize(
    "changes, fix",
    [
        (dict(baselines=("half",)), "choose from transformers,full"),
        (dict(runner="onnx"), "use one of ort .ONNX Runtime., torch"),
        (dict(batches=(0,)), "use 1,8,32"),
        (dict(batches=()), "use 1,8,32"),
        (dict(steps=0), "times nothing; use 96"),
        (dict(threads=0), "--threads 0"),
        (dict(rounds=-1), "--rounds -1 is below 0; use 7"),
        (dict(profile=True, runner="torch"), "--runner ort"),
    ],
)
def test_bad_input(changes: dict[str, object], fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        check_spec(BenchSpec((Path("x"),), **changes))


def test_baselines_need_the_checkpoint_of_the_bundle() -> None:
    with pytest.raises(UserError, match="give --model DIR, or --baselines none"):
        run_bench(BenchSpec((compressed(),)))
    with pytest.raises(UserError, match="another checkpoint"):
        run_bench(BenchSpec((compressed(),), model=str(checkpoint(TinyJanus(num_layers=1)))))
    other = bundle(checkpoint(TinyJanus(num_layers=1)), "full", 1.0)
    with pytest.raises(UserError, match="different checkpoints"):
        run_bench(BenchSpec((compressed(), other)))


def test_a_bundle_of_the_first_layers_finds_its_checkpoint() -> None:
    whole = open_checkpoint(checkpoint(TINY))
    smaller = whole.first_layers(1)
    opened = open_bundle(compressed())
    config = replace(
        opened.config,
        model=replace(opened.config.model, num_layers=1),
        model_fingerprint=smaller.fingerprint(),
    )
    few = replace(opened, config=config)
    assert is_of(checkpoint_like(few, str(whole.path)), few) and not is_of(whole, few)
    assert is_of(checkpoint_like(opened, str(whole.path)), opened)
    with pytest.raises(UserError, match="all 2 layers, the bundle with 1; use --baselines full"):
        _checkpoint([few], BenchSpec((few.path,), model=str(whole.path)))


def test_a_share_above_all_is_explained_where_there_is_one() -> None:
    rates = {"read_bandwidth": 1e9, "copy_bandwidth": 1e9, "matrix_rate": 1e9, "dtype": "float32"}
    for share, is_said in ((0.9, False), (1.3, True)):
        note = roofline_note({"rates": rates, "rows": [{"share_of_read_bound": share}, {}]})
        assert ("More than 100 %" in note) == is_said
