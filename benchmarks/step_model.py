"""A model, not a measurement: what a decode step should take on GPUs that are not here, beside the
bound of their bandwidth and arithmetic, by what a launch of the attention kernel serves: a head
group (the plugin), or a layer, whose slots are split where its heads are few (the torch runner).

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

from benchmarks.kernel_code import GROUP, LAYER, PART
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
NODES_A_LAYER = 20  # TensorRT-RTX lists 470 layers for 24 of the model, in the kv-update form
COLUMNS = [
    "GPU",
    "images",
    "bound ms",
    "step ms",
    "share of bound",
    "of it attention ms",
    "a launch a layer, ms",
    "and slots split, ms",
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
    """A step of a batch on a GPU. programs: that a multiprocessor holds at once, by what a launch
    of the kernel serves.
    """

    gpu: Gpu
    programs: Mapping[str, int]
    cost: StepCost
    launches: tuple[Launch, ...]
    layer_of: tuple[int, ...]  # of each launch
    most_slots: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.layer_of[-1] + 1

    @property
    def bound(self) -> float:
        """Seconds that no step can be under."""
        return self.cost.bound_seconds(self.gpu.bandwidth, self.gpu.rate)

    @property
    def attention(self) -> float:
        """Seconds of all launches of the kernel, one a head group."""
        return self._reading(self.launches, GROUP)

    @property
    def seconds(self) -> float:
        """A step with a launch a head group: products and attention one after the other, and
        nodes.
        """
        return self._products + self.attention

    @property
    def by_layer(self) -> float:
        """A step with a launch a layer."""
        spared = (len(self.launches) - self.num_layers) * self.gpu.node_seconds
        return self._products - spared + self._reading(self._layers(), LAYER)

    @property
    def split(self) -> float:
        """A step with a launch a layer, slots split as the torch runner does: a further node adds
        the parts up.
        """
        from ssd_export.kernels.layer_attention import splits

        layers, blocks = self._layers(), self.most_slots // BLOCK_SLOTS
        parts = [splits(one.programs, blocks, self.gpu.multiprocessors) for one in layers]
        if max(parts) == 1:
            return self.by_layer
        filled = [
            replace(one, programs=n * one.programs) for one, n in zip(layers, parts, strict=True)
        ]
        nodes = (2 * self.num_layers - len(self.launches)) * self.gpu.node_seconds
        return self._products + nodes + self._reading(filled, PART)

    @property
    def _products(self) -> float:
        """All but the reading of caches: weights or arithmetic, and the nodes of the graph."""
        reading = self.cost.weight_bytes / self.gpu.bandwidth
        nodes = NODES_A_LAYER * self.num_layers * self.gpu.node_seconds
        return max(reading, self.cost.operations / self.gpu.rate) + nodes

    def _reading(self, launches: Sequence[Launch], serves: str) -> float:
        most = self.programs[serves] * self.gpu.multiprocessors
        return sum(
            launch.num_bytes
            / min(self.gpu.bandwidth, min(launch.programs, most) * IN_FLIGHT / LATENCY)
            for launch in launches
        )

    def _layers(self) -> list[Launch]:
        """The groups of each layer together."""
        together = [Launch(0, 0)] * self.num_layers
        for place, one in zip(self.layer_of, self.launches, strict=True):
            held = together[place]
            together[place] = Launch(held.programs + one.programs, held.num_bytes + one.num_bytes)
        return together


def launches_of(bundle: Bundle, batch: int) -> Iterator[Launch]:
    """One for each head group of each layer; each reads its keys and values once."""
    config = bundle.config.model
    rows = config.rows_per_image * batch
    for groups in bundle.config.policy.layers:
        for group in groups:
            programs = rows * group.num_heads
            width = 2 * config.head_dim * DTYPES[bundle.config.dtype].num_bytes
            yield Launch(programs, programs * group.num_slots * width)


def models_of(
    bundle: Bundle, programs: Mapping[int, Mapping[str, int]]
) -> Iterator[tuple[int, StepModel]]:
    """Every GPU and batch. programs: that a multiprocessor holds, by target and kernel."""
    layers = bundle.config.policy.layers
    layer_of = tuple(layer for layer, groups in enumerate(layers) for _ in groups)
    most_slots = max(group.num_slots for group in bundle.config.policy.groups())
    for gpu in GPUS:
        for batch in BATCHES:
            launches, cost = tuple(launches_of(bundle, batch)), step_cost(bundle, batch)
            of_gpu = programs[gpu.target]
            yield batch, StepModel(gpu, of_gpu, cost, launches, layer_of, most_slots)


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
    later = (model.attention, model.by_layer, model.split)
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
        f" weights {precision.weights}; step ms: with a launch a head group."
    )
    results = {"tables": [table(TITLE, COLUMNS, rows, note)]}
    write_measurement(asked.json, measurement(COMMAND, results))


if __name__ == "__main__":
    main()
