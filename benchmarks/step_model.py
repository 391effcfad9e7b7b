"""A model, not a measurement: what a decode step should take on GPUs that are not here, beside the
bound of their bandwidth and arithmetic: attention with a launch a layer, and with slots split where
heads are few, as the plugin and the torch runner choose.

    python -m benchmarks.step_model BUNDLE

Bytes and operations are those of bench's bound (bench/roofline.py), of this bundle. A step reads
its weights at full bandwidth. A launch of the attention kernel reads its caches no faster than its
programs keep bytes on their way: as many as fit on the multiprocessors at once
(docs/measurements/kernel_code.json), IN_FLIGHT bytes each, LATENCY for a round trip. Every layer
that the builder lists costs the time of a node of a CUDA graph. Bandwidths and rates are the
vendor's; latency and nodes are guesses of the usual size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kernel_code import LAYER, PART
from ssd_export.bench.roofline import StepCost, step_cost
from ssd_export.bundle import Bundle, open_bundle
from ssd_export.dtypes import DTYPES
from ssd_export.report.measurement import measurement, table, write_measurement

JSON = Path("docs/measurements/step_model.json")
KERNEL_CODE = Path("docs/measurements/kernel_code.json")
COMMAND = "python -m benchmarks.step_model BUNDLE"
TITLE = "A decode step of Janus-Pro-1B's shape (model, nothing of it was run)"
BATCHES = (1, 8, 128)
IN_FLIGHT, LATENCY = 32 << 10, 0.8e-6  # bytes of a program; seconds
BLOCK_SLOTS = 16  # of the kernel at head_dim 128
# TensorRT-RTX lists 470 layers for 24 of the model, in the kv-update form with two head groups; the
# plugin has one node for both.
NODES_A_LAYER = 19
COLUMNS = [
    "GPU",
    "images",
    "bound ms",
    "step ms",
    "share of bound",
    "of it attention ms",
    "programs a head",
    "ms with one",
]


@dataclass(frozen=True)
class Gpu:
    """Numbers of a GPU for the model. bandwidth: bytes a second; rate: float16 operations a second;
    node_seconds: of a node of a CUDA graph.
    """

    name: str
    target: int
    multiprocessors: int
    bandwidth: float
    rate: float
    node_seconds: float


GPUS = (
    Gpu("Jetson AGX Orin", 87, 16, 204.8e9, 42e12, 3e-6),
    Gpu("RTX 4060", 89, 24, 272e9, 30e12, 1.2e-6),
    Gpu("H200", 90, 132, 4.8e12, 989e12, 1.2e-6),
)


@dataclass(frozen=True)
class Launch:
    """Attention of one layer: programs and the bytes that they read."""

    programs: int
    num_bytes: int


@dataclass(frozen=True)
class StepModel:
    """A step of a batch on a GPU. programs: that a multiprocessor holds at once, by what a launch
    of the kernel serves.
    """

    gpu: Gpu
    programs: Mapping[str, int]
    cost: StepCost
    launches: tuple[Launch, ...]
    most_slots: int

    @property
    def bound(self) -> float:
        """Seconds that no step can be under."""
        return self.cost.bound_seconds(self.gpu.bandwidth, self.gpu.rate)

    @property
    def num_splits(self) -> int:
        """Programs for the slots of a head."""
        from ssd_export.kernels.constants import splits

        blocks, num = self.most_slots // BLOCK_SLOTS, self.gpu.multiprocessors
        return max(splits(one.programs, blocks, num) for one in self.launches)

    @property
    def attention(self) -> float:
        """Seconds of all launches of the kernels."""
        if self.num_splits == 1:
            return self._reading(self.launches, LAYER)
        split = [replace(one, programs=self.num_splits * one.programs) for one in self.launches]
        # a further node adds the parts up
        return self._reading(split, PART) + len(split) * self.gpu.node_seconds

    @property
    def seconds(self) -> float:
        """A step: products and attention one after the other, and nodes."""
        return self._products + self.attention

    @property
    def not_split(self) -> float:
        """A step with one program a head."""
        return self._products + self._reading(self.launches, LAYER)

    @property
    def _products(self) -> float:
        """All but the reading of caches: weights or arithmetic, and the nodes of the graph."""
        reading = self.cost.weight_bytes / self.gpu.bandwidth
        nodes = NODES_A_LAYER * len(self.launches) * self.gpu.node_seconds
        return max(reading, self.cost.operations / self.gpu.rate) + nodes

    def _reading(self, launches: Sequence[Launch], serves: str) -> float:
        most = self.programs[serves] * self.gpu.multiprocessors
        return sum(
            launch.num_bytes
            / min(self.gpu.bandwidth, min(launch.programs, most) * IN_FLIGHT / LATENCY)
            for launch in launches
        )


def launches_of(bundle: Bundle, batch: int) -> Iterator[Launch]:
    """One for each layer; each reads the keys and values of its groups once."""
    config = bundle.config.model
    rows = config.rows_per_image * batch
    width = 2 * config.head_dim * DTYPES[bundle.config.dtype].num_bytes
    for groups in bundle.config.policy.layers:
        programs = rows * sum(group.num_heads for group in groups)
        slots = rows * sum(group.num_heads * group.num_slots for group in groups)
        yield Launch(programs, slots * width)


def models_of(
    bundle: Bundle, programs: Mapping[int, Mapping[str, int]]
) -> Iterator[tuple[int, StepModel]]:
    """Every GPU and batch. programs: that a multiprocessor holds, by target and kernel."""
    most_slots = max(group.num_slots for group in bundle.config.policy.groups())
    for gpu in GPUS:
        for batch in BATCHES:
            launches, cost = tuple(launches_of(bundle, batch)), step_cost(bundle, batch)
            yield batch, StepModel(gpu, programs[gpu.target], cost, launches, most_slots)


def programs_by_target(path: Path = KERNEL_CODE) -> dict[int, dict[str, int]]:
    """Programs of the float16 kernels that run at once, as their machine code allows."""
    found: dict[int, dict[str, int]] = {}
    for row in json.loads(path.read_text())["results"]["kernels"]:
        if row["dtype"] == "float16":
            found.setdefault(row["target"], {})[row["serves"]] = row["programs"]
    return found


def row_of(batch: int, model: StepModel) -> list[str]:
    """A row of the table."""
    times = (model.bound, model.seconds)
    return [
        model.gpu.name,
        str(batch),
        *(f"{1000 * seconds:.2f}" for seconds in times),
        f"{model.bound / model.seconds:.0%}",
        f"{1000 * model.attention:.2f}",
        str(model.num_splits),
        f"{1000 * model.not_split:.2f}",
    ]


def main() -> None:
    """Runs the model that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", type=Path, default=JSON)
    asked = parser.parse_args()
    bundle = open_bundle(asked.bundle)
    rows = [row_of(*model) for model in models_of(bundle, programs_by_target())]
    policy, precision = bundle.config.policy, bundle.config.precision
    note = (
        f"{policy.name} at budget {policy.budget:g}, {bundle.config.dtype},"
        f" weights {precision.weights}"
    )
    results = {"tables": [table(TITLE, COLUMNS, rows, note)]}
    write_measurement(asked.json, measurement(COMMAND, results))


if __name__ == "__main__":
    main()
