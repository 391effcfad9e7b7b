"""Speed of the trt runner on a GPU: a random checkpoint of a published shape, full cache and budget
0.2.

Of each batch one image is generated to capture the CUDA graphs and one is timed, the device waited
for at its end.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_export.bench.roofline import MachineRates, StepCost, step_cost
from ssd_export.bundle import Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.report.measurement import table
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.sampling import Sampling
from ssd_export.tensorrt.build import build_engines
from ssd_export.tensorrt.plan import BuildSpec, plan_build
from ssd_export.tensorrt.runner import TrtRunner, open_device
from ssd_export.tensorrt.target import Batch

PROMPT = "a red circle above a blue square"
BUDGETS = (("full", 1.0), (None, 0.2))  # None: the default policy of the shape


@dataclass(frozen=True)
class Speed:
    """One batch of one bundle. seconds: of all decode steps; *_bytes: device memory; cost: what a
    step must move.
    """

    policy: str
    plugin: bool
    batch: int
    num_steps: int
    seconds: float
    prefill_ms: float
    image_ms: float
    memory: dict[str, int]
    graphs: str
    cost: dict[str, int]

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of one decode step."""
        return 1000 * self.seconds / self.num_steps

    @property
    def tokens_per_second(self) -> float:
        """Image tokens a second, over all images of the batch."""
        return self.batch * self.num_steps / self.seconds


def measure_speed(
    shape: str, batches: Sequence[int], say: Callable[[str], None]
) -> Iterator[Speed]:
    """Exports, builds with the plugin where it is at hand, and measures. Raises: UserError for what
    is missing.
    """
    from benchmarks.synthetic_checkpoint import write_checkpoint
    from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle

    with tempfile.TemporaryDirectory(prefix="ssd-export-gpu-") as folder:
        model = write_checkpoint(Path(folder) / "checkpoint", shape, "transformers", "fp16")
        for policy, budget in BUDGETS:
            say(f"speed: export and build, policy {policy or 'default'}, budget {budget:g}")
            with temporary_bundle(PolicyChoice(str(model), policy, budget, dtype="fp16")) as path:
                wanted = Batch(1, sorted(batches)[len(batches) // 2], max(batches))
                build_engines(plan_build(BuildSpec(bundle=path, batch=wanted)))
                yield from speeds_of(open_bundle(path), batches, say)


def speeds_of(
    bundle: Bundle, batches: Sequence[int], say: Callable[[str], None]
) -> Iterator[Speed]:
    """Speeds of a bundle's engines; a batch that does not fit the device's memory is named and left
    out.
    """
    files, device = open_device(bundle)
    runner = TrtRunner(bundle, files, device)
    try:
        for batch in batches:
            try:
                speed = speed_of(runner, bundle, batch, files.evicts_in_step)
            except UserError as error:
                say(f"speed: batch {batch} not run ({error})")
                continue
            say(
                f"speed: {speed.policy}, batch {batch}: {speed.ms_per_token:.3f} ms a token, "
                f"{speed.tokens_per_second:,.0f} tokens/s"
            )
            yield speed
    finally:
        runner.close()


def speed_of(runner: TrtRunner, bundle: Bundle, num_images: int, plugin: bool) -> Speed:
    """Image tokens a second of a runner at one batch size."""
    batch = PromptBatches.from_bundle(bundle)([PROMPT] * num_images, Sampling(), seed=0)
    policy = bundle.config.policy
    for _ in range(2):  # the first captures the graphs
        loop = decode(runner, batch, policy)
        prefill = _timed(runner, lambda loop=loop: next(loop))
        seconds = _timed(runner, lambda loop=loop: deque(loop, maxlen=0))
    tokens = runner.tokens()[:1]
    runner.decode_image(tokens)
    image = _timed(runner, lambda: runner.decode_image(tokens))
    graphs, cost = graph_text(runner.graph_nodes()), vars(step_cost(bundle, num_images))
    return Speed(
        f"{policy.name} {policy.budget:g}",
        plugin,
        num_images,
        policy.grid.num_tokens - 1,
        seconds,
        1000 * prefill,
        1000 * image,
        runner.memory_report(),
        graphs,
        cost,
    )


def graph_text(nodes: dict[str, int]) -> str:
    """The CUDA graphs that were captured and how large they are."""
    return ", ".join(f"{kind} {count} nodes" for kind, count in nodes.items()) or "none captured"


def speed_table(
    shape: str, speeds: Sequence[Speed], rates: dict[str, Any] | None
) -> dict[str, Any]:
    """Every measured batch beside the stricter bound of the measured rates (roofline.py), not run
    without them.
    """
    columns = [
        "policy, budget",
        "plugin",
        "images",
        "ms a token",
        "tokens/s",
        "bound ms",
        "share of bound",
        "prefill ms",
        "one image's pixels ms",
        "caches MiB",
        "device MiB",
        "CUDA graphs",
    ]
    rows = []
    for speed in speeds:
        bound = None if rates is None else _bound_ms(StepCost(**speed.cost), MachineRates(**rates))
        used = sum(speed.memory[part] for part in ("engines", "weights", "buffers", "graphs"))
        rows.append(
            [
                speed.policy,
                "yes" if speed.plugin else "no",
                str(speed.batch),
                f"{speed.ms_per_token:.3f}",
                f"{speed.tokens_per_second:,.0f}",
                bound and f"{bound:.3f}",
                bound and f"{bound / speed.ms_per_token:.0%}",
                f"{speed.prefill_ms:.1f}",
                f"{speed.image_ms:.1f}",
                f"{speed.memory['caches'] / 2**20:,.0f}",
                f"{used / 2**20:,.0f}",
                speed.graphs,
            ]
        )
    note = (
        f"trt runner, random weights in the shape of {shape}, fp16; one image timed after one"
        " that captures"
    )
    return table("Speed on the GPU", columns, rows, note)


def _bound_ms(cost: StepCost, rates: MachineRates) -> float:
    return 1000 * cost.bound_seconds(
        max(rates.read_bandwidth, rates.copy_bandwidth), rates.matrix_rate
    )


def _timed(runner: TrtRunner, work: Callable[[], object]) -> float:
    runner.synchronize()
    began = time.perf_counter()
    work()
    runner.synchronize()
    return time.perf_counter() - began
