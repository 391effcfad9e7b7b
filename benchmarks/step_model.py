"""A model, not a measurement: what a decode step should take on GPUs that are not here, beside the
bound of their bandwidth and arithmetic, and what two changes to the attention kernel would bring.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
NODES_A_LAYER = 20  # TensorRT-RTX lists 470 layers for 24 of the model, in the kv-update form
COLUMNS = [
    "GPU",
    "images",
    "bound ms",
    "step ms",
    "share of bound",
    "of it attention ms",
    "slots split, ms",
    "one launch a layer, ms",
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
    """Attention of one head group of one layer: programs and the bytes that they read."""

    programs: int
    num_bytes: int


@dataclass(frozen=True)
class StepModel:
    """A step of a batch on a GPU. programs: of the kernel that a multiprocessor holds at once."""

    gpu: Gpu
    programs: int
    cost: StepCost
    launches: tuple[Launch, ...]
    num_layers: int

    @property
    def bound(self) -> float:
        """Seconds that no step can be under."""
        return self.cost.bound_seconds(self.gpu.bandwidth, self.gpu.rate)

    @property
    def attention(self) -> float:
        """Seconds of all launches of the kernel."""
        most = self.programs * self.gpu.multiprocessors
        return sum(
            launch.num_bytes
            / min(self.gpu.bandwidth, min(launch.programs, most) * IN_FLIGHT / LATENCY)
            for launch in self.launches
        )

    @property
    def seconds(self) -> float:
        """The step: its products and its attention one after the other, and its nodes."""
        products = max(
            self.cost.weight_bytes / self.gpu.bandwidth, self.cost.operations / self.gpu.rate
        )
        nodes = NODES_A_LAYER * self.num_layers
        return products + self.attention + nodes * self.gpu.node_seconds

    @property
    def split(self) -> float:
        """Seconds where several programs share the slots of a head, as many as fit."""
        most = self.programs * self.gpu.multiprocessors
        filled = tuple(replace(one, programs=max(one.programs, most)) for one in self.launches)
        return replace(self, launches=filled).seconds

    @property
    def one_launch(self) -> float:
        """Seconds where all groups of a layer are one launch."""
        together = [Launch(0, 0)] * self.num_layers
        for place, one in enumerate(self.launches):
            layer = place * self.num_layers // len(self.launches)
            held = together[layer]
            together[layer] = Launch(held.programs + one.programs, held.num_bytes + one.num_bytes)
        spared = (len(self.launches) - self.num_layers) * self.gpu.node_seconds
        return replace(self, launches=tuple(together)).seconds - spared


def launches_of(bundle: Bundle, batch: int) -> Iterator[Launch]:
    """One for each head group of each layer; each reads its keys and values once."""
    config = bundle.config.model
    rows = config.rows_per_image * batch
    for groups in bundle.config.policy.layers:
        for group in groups:
            programs = rows * group.num_heads
            width = 2 * config.head_dim * DTYPES[bundle.config.dtype].num_bytes
            yield Launch(programs, programs * group.num_slots * width)


def models_of(bundle: Bundle, programs: dict[int, int]) -> Iterator[tuple[int, StepModel]]:
    """Every GPU and batch. programs: that a multiprocessor holds, by target."""
    for gpu in GPUS:
        for batch in BATCHES:
            launches = tuple(launches_of(bundle, batch))
            layers = bundle.config.model.num_layers
            cost = step_cost(bundle, batch)
            yield batch, StepModel(gpu, programs[gpu.target], cost, launches, layers)


def programs_by_target(path: Path = KERNEL_CODE) -> dict[int, int]:
    """Programs of the float16 kernel that run at once, as its machine code allows."""
    kernels = json.loads(path.read_text())["results"]["kernels"]
    return {row["target"]: row["programs"] for row in kernels if row["dtype"] == "float16"}


def row_of(batch: int, model: StepModel) -> list[str]:
    """A row of the table."""
    times = (model.bound, model.seconds)
    later = (model.attention, model.split, model.one_launch)
    return [
        model.gpu.name,
        str(batch),
        *(f"{1000 * seconds:.2f}" for seconds in times),
        f"{model.bound / model.seconds:.0%}",
        *(f"{1000 * seconds:.2f}" for seconds in later),
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
        f" weights {precision.weights}; the last two columns are the step with that change alone."
    )
    results = {"tables": [table(TITLE, COLUMNS, rows, note)]}
    write_measurement(asked.json, measurement(COMMAND, results))


if __name__ == "__main__":
    main()
