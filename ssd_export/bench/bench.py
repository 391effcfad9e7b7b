"""Speed and memory of bundles beside two baselines in one run: transformers, and the full cache in
the same runner.

Every figure is measured in a separate process (bench_process.py), one after the other; the
machine's rates first, so that each row can say which share of the roofline it reaches. Whole images
are generated in turns, all caches in one process. Ratios and shares are of the time that passed;
with one CPU thread of its CPU time, which on a quiet machine is the same and on a busy one still
means something.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ssd_export.bench.cell import Cell, on_device
from ssd_export.bench.full_cache_bundle import full_twin
from ssd_export.bench.process import in_process, run_cell
from ssd_export.bench.roofline import MachineRates, StepCost, step_cost
from ssd_export.bench.spec import FULL, TRANSFORMERS, BenchSpec, check_spec
from ssd_export.bench.whole_images import SMALL_MODEL_ROUNDS, ImageRounds, measure_images
from ssd_export.bundle import Bundle, open_bundle
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.export.source_checkpoint import checked, checkpoint_like
from ssd_export.machine import num_cpus
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.families import janus
from ssd_export.model.find import DEMOS
from ssd_export.plan.generation import check_caches
from ssd_export.runtime.runners import find_runner
from ssd_export.runtime.small_models import is_small
from ssd_export.runtime.zipar import check_whole_caches
from ssd_export.sampling import rows_start

Progress = Callable[[str, int, int], None]


def run_bench(
    spec: BenchSpec, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """{"settings", "rates", "rows"}: a row for each bundle, full cache and transformers at each
    batch.

    Raises: UserError for a bundle that does not open, a baseline that needs a checkpoint which is
    not at hand.
    """
    spec = check_spec(spec)
    bundles = [open_bundle(path) for path in spec.bundles]
    _check_steps(bundles, spec)
    if any(rows_start(mode) for mode in spec.lookahead):
        for bundle in bundles:
            check_whole_caches(bundle.config.policy)
    _check_memory(bundles, spec)
    checkpoint = _checkpoint(bundles, spec)
    threads = spec.threads or _default_threads(bundles)
    rounds = _default_rounds(bundles) if spec.rounds is None else spec.rounds
    rounds = max(rounds, 1) if spec.lookahead else rounds
    provider = find_runner(spec.runner).provider(spec.provider)
    common = Cell("rates", None, spec.runner, provider, 1, spec.steps, threads)
    with ExitStack() as stack:
        twins = [
            stack.enter_context(full_twin(bundle, checkpoint))
            for bundle in _without_full(bundles, spec)
            if checkpoint is not None
        ]
        subjects = [*bundles, *twins]
        rates = MachineRates(**run_cell(common, _stage(progress, "bandwidth and matrix rate")))
        decoder_seconds: dict[str, float] = {}
        rows = []
        for batch in spec.batches:
            of_batch = replace(common, batch=batch)
            cells, found = zip(
                *_rows(subjects, checkpoint, of_batch, decoder_seconds, spec, progress), strict=True
            )
            rows += _with_images(list(found), ImageRounds(cells, rounds), spec.lookahead, progress)
    clock = "cpu_" if threads == 1 and not on_device(common) else ""
    for row in rows:
        row["compared_ms"] = row[f"{clock}ms_per_token"]
        row["compared_seconds"] = row.get(f"batch_{clock}seconds")
    for row in rows:
        row |= _bounds(row, rates) | _ratios(row, rows)
    settings = {
        "runner": spec.runner,
        "provider": spec.provider,
        "threads": threads,
        "steps": spec.steps,
        "rounds": rounds,
        "baselines": list(spec.baselines),
        "model": bundles[0].config.model_name,
        "model_config": bundles[0].config.model.to_dict(),
    }
    ahead = [one for row in rows for one in row.pop("lookahead", ())]
    results = {"settings": settings, "rates": rates.to_dict(), "rows": rows}
    return results | ({"lookahead": ahead} if ahead else {})


def _check_steps(bundles: list[Bundle], spec: BenchSpec) -> None:
    """Raises UserError for more steps than an image has."""
    most = min(bundle.config.model.grid.num_tokens for bundle in bundles) - 1
    if spec.steps > most:
        raise UserError(f"--steps {spec.steps} is outside 1 .. {most}; use {min(96, most)}")


def _check_memory(bundles: list[Bundle], spec: BenchSpec) -> None:
    """Raises UserError where the largest batch does not fit this machine, before it is tried."""
    if find_runner(spec.runner).provider(spec.provider) == "cpu":
        for bundle in bundles:
            check_caches(bundle, max(spec.batches))


def _default_threads(bundles: list[Bundle]) -> int:
    return 1 if all(is_small(bundle.config.model) for bundle in bundles) else num_cpus()


def _default_rounds(bundles: list[Bundle]) -> int:
    """Rounds of whole images where they take seconds, none where they take minutes."""
    return SMALL_MODEL_ROUNDS if all(is_small(bundle.config.model) for bundle in bundles) else 0


def _checkpoint(bundles: list[Bundle], spec: BenchSpec) -> Checkpoint | None:
    """The checkpoint of the bundles, None where no baseline needs one. Raises: UserError where it
    is not at hand.
    """
    if len({bundle.config.model_fingerprint for bundle in bundles}) > 1:
        raise UserError(
            "the bundles were made from different checkpoints; bench those of one checkpoint at a"
            " time"
        )
    if TRANSFORMERS not in spec.baselines and not _without_full(bundles, spec):
        return None
    name = bundles[0].config.model_name
    if spec.model is None and name not in DEMOS:
        raise UserError(
            f"the baselines need the checkpoint of {name}; give --model DIR, or --baselines none"
        )
    checkpoint = checked(checkpoint_like(bundles[0], spec.model or name), bundles[0])
    if TRANSFORMERS in spec.baselines and checkpoint.config.family != janus.NAME:
        raise UserError(
            f"the transformers baseline is for {janus.TITLE}, and {name} is of the family"
            f" {checkpoint.config.family}; use --baselines full"
        )
    if (
        TRANSFORMERS in spec.baselines
        and checkpoint.config.num_layers < checkpoint.num_layers_of_the_model
    ):
        raise UserError(
            f"transformers generates with all {checkpoint.num_layers_of_the_model} layers, the"
            f" bundle with {checkpoint.config.num_layers}; use --baselines full"
        )
    return checkpoint


def kind_of(bundle: Bundle) -> str:
    """The kind that bundles must share to be compared: fp32, or fp16-int4."""
    dtype = DTYPES[bundle.config.dtype].short
    weights = bundle.config.precision.name
    cache = bundle.config.policy.kv_dtype
    stored = f"kv-{cache}" if cache != "model" else None
    return "-".join(
        part for part in (dtype, None if weights == "none" else weights, stored) if part
    )


def _is_full(bundle: Bundle) -> bool:
    return bundle.config.policy.name == FULL


def _without_full(bundles: list[Bundle], spec: BenchSpec) -> list[Bundle]:
    """One bundle of each kind that has no full cache beside it."""
    if FULL not in spec.baselines:
        return []
    have = {kind_of(bundle) for bundle in bundles if _is_full(bundle)}
    return list(
        {kind_of(bundle): bundle for bundle in bundles if kind_of(bundle) not in have}.values()
    )


def _rows(
    subjects: list[Bundle],
    checkpoint: Checkpoint | None,
    common: Cell,
    decoder_seconds: dict[str, float],
    spec: BenchSpec,
    progress: Progress,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The cells and rows of one batch.

    decoder_seconds: of the image decoder by runner, measured with its first row.
    """
    for bundle in subjects:
        policy = bundle.config.policy
        name = f"{policy.name} {policy.budget:g}, {kind_of(bundle)}"
        cell = replace(
            common, kind="bundle", path=bundle.path, image_seconds=decoder_seconds.get(spec.runner)
        )
        figures = run_cell(cell, _stage(progress, f"{name}, batch {cell.batch}"))
        decoder_seconds[spec.runner] = figures["image_decoder_seconds"]
        if spec.profile:
            figures |= run_cell(
                replace(cell, kind="profile"),
                _stage(progress, f"profile of {name}, batch {cell.batch}"),
            )
        cost = step_cost(bundle, cell.batch)
        yield (
            cell,
            {
                "policy": policy.name,
                "budget": policy.budget,
                "kind": kind_of(bundle),
                "runner": spec.runner,
                "batch": cell.batch,
                "build_seconds": build_seconds(bundle, spec.runner),
                **figures,
                "step_cost": vars(cost),
            },
        )
    if TRANSFORMERS in spec.baselines and checkpoint is not None:
        cell = replace(
            common,
            kind=TRANSFORMERS,
            path=checkpoint.path,
            image_seconds=decoder_seconds.get(TRANSFORMERS),
        )
        figures = run_cell(cell, _stage(progress, f"transformers, batch {cell.batch}"))
        decoder_seconds[TRANSFORMERS] = figures["image_decoder_seconds"]
        yield (
            cell,
            {
                "policy": TRANSFORMERS,
                "budget": 1.0,
                "kind": "fp16" if spec.provider == "cuda" else "fp32",
                "runner": TRANSFORMERS,
                "batch": cell.batch,
                **figures,
            },
        )


def _with_images(
    rows: list[dict[str, Any]],
    images: ImageRounds,
    lookahead: Sequence[int | str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """The rows with the figures of whole images, where any are generated, and those of each mode of
    lookahead beside them.
    """
    if not images.rounds:
        return rows
    told = _stage(progress, f"whole images in turns, batch {images.batch}")
    modes = [
        (index, replace(cell, lookahead=mode))
        for index, cell in enumerate(images.cells)
        for mode in lookahead
        if cell.kind == "bundle"
    ]
    cells = images.cells + tuple(cell for _, cell in modes)
    figures = in_process(measure_images, replace(images, cells=cells), told)
    rows = [row | measured for row, measured in zip(rows, figures, strict=False)]
    for (index, cell), measured in zip(modes, figures[len(rows) :], strict=True):
        rows[index].setdefault("lookahead", []).append(_ahead(rows[index], cell, measured))
    return rows


def _ahead(row: dict[str, Any], cell: Cell, measured: dict[str, Any]) -> dict[str, Any]:
    """The row of a mode of lookahead; row: that of single steps."""
    clock = "batch_cpu_seconds" if cell.threads == 1 and not on_device(cell) else "batch_seconds"
    ratios = [a / b for a, b in zip(row[clock], measured[clock], strict=True)]
    assert cell.path is not None
    steps = open_bundle(cell.path).config.model.grid.num_tokens - 1
    passes = statistics.fmean(measured["passes"])
    named = {name: row[name] for name in ("policy", "budget", "kind", "batch")}
    return named | {
        "lookahead": cell.lookahead,
        "passes": passes,
        "tokens_per_pass": steps / passes,
        "ms_per_token": 1000 * statistics.median(measured["batch_seconds"]) / (steps + 1),
        "off_ms_per_token": 1000 * statistics.median(row["batch_seconds"]) / (steps + 1),
        "times_faster": statistics.median(ratios),
    }


def build_seconds(bundle: Bundle, runner: str) -> float | None:
    """Seconds that building the bundle's engines took, None for a runner that has none."""
    if not find_runner(runner).has_engines:
        return None
    from ssd_export.tensorrt.engine_manifest import read_engines

    return sum(
        entry.seconds
        for engine in read_engines(bundle).values()
        for entry in engine.graphs.values()
    )


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    progress(name, 0, 1)
    return lambda done, total: progress(name, done, total)


def _bounds(row: dict[str, Any], rates: MachineRates) -> dict[str, Any]:
    """Bounds of the roofline and the share of them reached, by each of the two bandwidths."""
    if "step_cost" not in row:
        return {}
    cost = StepCost(**row["step_cost"])
    copying, reading = (
        1000 * cost.bound_seconds(band, rates.matrix_rate)
        for band in (rates.copy_bandwidth, rates.read_bandwidth)
    )
    return {
        "bound_ms_copy": copying,
        "bound_ms_read": reading,
        "limit": cost.limit(rates),
        "share_of_copy_bound": copying / row["compared_ms"],
        "share_of_read_bound": reading / row["compared_ms"],
    }


def _ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Speed relative to each baseline at the same batch, by whole images where they were generated
    and by a step; None where the baseline was not run.
    """
    same = [other for other in rows if other["batch"] == row["batch"]]
    full = [other for other in same if other["policy"] == FULL and other["kind"] == row["kind"]]
    theirs = [other for other in same if other["policy"] == TRANSFORMERS]
    found: dict[str, float | None] = {}
    for name, others in (("full", full), ("transformers", theirs)):
        step = others[0]["compared_ms"] / row["compared_ms"] if others else None
        found[f"step_ratio_to_{name}"] = step
        found[f"ratio_to_{name}"] = _ratio_of_images(others[0], row) if others else None
    return found


def _ratio_of_images(baseline: dict[str, Any], row: dict[str, Any]) -> float:
    """The median ratio of a round; by the step where no whole images were generated."""
    theirs, own = baseline.get("compared_seconds"), row.get("compared_seconds")
    if not theirs or not own:
        return baseline["compared_ms"] / row["compared_ms"]
    return statistics.median(other / mine for other, mine in zip(theirs, own, strict=True))
