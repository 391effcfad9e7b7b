"""Times the attention of one decode step of one layer in ONNX Runtime: compressed caches against a
full one.

    python -m benchmarks.attention [--policies ssd-row,ssd-auto] [--threads 1,2]
    [--out FILE.json]

The caches are stepped in turn in the same process; a run is the median over its steps, and a ratio
that of two runs one after the other. A step includes the evictions that fall due. Layers differ
where heads do: six of them, evenly spaced, stand for all. ssd-auto gets the demo model's costs,
spread over the heads of the larger shape.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.attention_layers import LayersRun
from ssd_export.bench.report import lines_of
from ssd_export.config import ModelConfig
from ssd_export.machine import num_cpus
from ssd_export.model.families import PUBLISHED, assumed_head_map
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.policy.head_map import HeadMap, find_head_map
from ssd_export.policy.table import PolicyTable
from ssd_export.policy.usual import usual_policy
from ssd_export.report.environment import busy_note
from ssd_export.report.measurement import measurement, write_measurement
from ssd_export.report.measurement import table as table_of

NUM_LAYERS = 6  # that stand for all of them


def policy_table(name: str, config: ModelConfig, budget: float) -> PolicyTable:
    """The table of a policy for a published shape; ssd-auto with the costs of the demo
    model's heads.
    """
    head_map = find_head_map(config, assumed=assumed_head_map(config, ()))
    if name == "ssd-auto":
        head_map = stretched(HeadMap.load(DEMO_CHECKPOINT / "head_map.json"), config)
    return usual_policy(name, config, budget=1.0 if name == "full" else budget, head_map=head_map)


def stretched(small: HeadMap, config: ModelConfig) -> HeadMap:
    """The head map of a larger shape: each layer and head takes the metric and costs of one of the
    small model's.
    """
    layers = [layer * small.num_layers // config.num_layers for layer in range(config.num_layers)]
    heads = [head % small.num_kv_heads for head in range(config.num_kv_heads)]
    return replace(
        small,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        hidden_size=config.hidden_size,
        model_fingerprint="",
        statistics={},
        metric=tuple(tuple(small.kv_metric()[layer][head] for head in heads) for layer in layers),
        costs=tuple(tuple(small.costs[layer][head] for head in heads) for layer in layers),
    )


@dataclass(frozen=True)
class Options:
    """Layers, batch and repetitions to time."""

    shape: str
    images: int
    budget: float
    steps: int
    runs: int


@dataclass(frozen=True)
class Comparison:
    """A policy against the full cache; seconds of both by run, (passed, computed)."""

    threads: int
    policy: str
    mean_slots: float
    full: list[tuple[float, float]]
    compressed: list[tuple[float, float]]
    ratio_of_bytes: float

    def ratios(self, clock: int) -> list[float]:
        """Ratio of each run, in order of size; clock 0: of elapsed time, 1: of CPU time."""
        return sorted(slow[clock] / fast[clock] for slow, fast in zip(self.full, self.compressed))

    def cells(self) -> list[str]:
        """Table cells: median ms of each cache, their ratio with its range, and the ratio by CPU
        time.
        """
        passed = [
            f"{1000 * statistics.median(seconds for seconds, _ in runs):.1f}"
            for runs in (self.full, self.compressed)
        ]
        ratios, by_cpu = self.ratios(0), self.ratios(1)
        return [
            str(self.threads),
            self.policy,
            f"{self.mean_slots:.0f}",
            *passed,
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{statistics.median(by_cpu):.2f}",
            f"{self.ratio_of_bytes:.2f}",
        ]


def compare(policies: Sequence[str], threads: int, options: Options) -> list[Comparison]:
    """Each policy against the same full cache, run by run in turn."""
    config = PUBLISHED[options.shape]
    rows = config.rows_per_image * options.images
    full = LayersRun(policy_table("full", config, 1.0), [0], config, rows, threads)
    layers = range(
        config.num_layers // NUM_LAYERS // 2, config.num_layers, config.num_layers // NUM_LAYERS
    )
    found = []
    for name in policies:
        table = policy_table(name, config, options.budget)
        compressed = LayersRun(table, layers, config, rows, threads)
        pairs = [
            (full.median_seconds(options.steps), compressed.median_seconds(options.steps))
            for _ in range(options.runs)
        ]
        groups = [group for layer in layers for group in table.layers[layer]]
        slots = sum(group.num_heads * group.num_slots for group in groups) / sum(
            group.num_heads for group in groups
        )
        found.append(
            Comparison(
                threads, name, slots, *map(list, zip(*pairs)), full.num_bytes / compressed.num_bytes
            )
        )
    return found


def report(comparisons: Sequence[Comparison], options: Options) -> dict[str, Any]:
    """The comparisons as a table of ratios."""
    columns = [
        "threads",
        "policy",
        "slots a head",
        "full cache ms",
        "compressed ms",
        "ratio",
        "least and greatest run",
        "ratio of CPU time",
        "ratio of bytes",
    ]
    note = (
        f"{options.shape}, the average layer, {options.images} images ({2 * options.images} rows),"
        f" fp32, 64 prompt slots, budget {options.budget:g}; median of {options.runs} runs of"
        f" {options.steps} steps. The bytes bound the ratio of a step that moves at memory speed;"
        " CPU time is what remains of it where something else runs on the machine."
    )
    figures = {
        f"{one.policy}-{one.threads}": f"{statistics.median(one.ratios(0)):.2f}"
        for one in comparisons
    }
    tables = [table_of("", columns, [one.cells() for one in comparisons], note)]
    return {
        "tables": tables,
        "figures": figures,
        "comparisons": [asdict(one) for one in comparisons],
    }


def _names(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@click.command()
@click.option(
    "--shape", type=click.Choice(list(PUBLISHED)), default="janus-pro-1b", show_default=True
)
@click.option(
    "--images",
    default=32,
    show_default=True,
    help="Images at once; a step has twice as many rows.",
)
@click.option("--budget", default=0.2, show_default=True)
@click.option(
    "--policies",
    default="ssd-row,ssd-auto,streaming-llm,h2o,ssd",
    show_default=True,
    callback=_names,
)
@click.option(
    "--threads",
    default=",".join(dict.fromkeys(map(str, (1, num_cpus())))),
    show_default=True,
    callback=_names,
)
@click.option("--steps", default=24, show_default=True, help="Timed steps of each run.")
@click.option("--runs", default=7, show_default=True, help="Runs of each pair of caches.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the measurement there.")
def main(
    shape: str,
    images: int,
    budget: float,
    policies: list[str],
    threads: list[str],
    steps: int,
    runs: int,
    out: Path | None,
) -> None:
    """Prints milliseconds a step and the ratio for each policy and number of threads."""
    options, note = Options(shape, images, budget, steps, runs), busy_note()
    results = report(
        [one for count in threads for one in compare(policies, int(count), options)], options
    )
    command = shlex.join(["python", "-m", "benchmarks.attention", *sys.argv[1:]])
    measured = measurement(command, results, note)
    if out is not None:
        write_measurement(out, measured)
    for one in results["tables"]:
        click.echo("\n".join(lines_of(one)))


if __name__ == "__main__":
    main()
