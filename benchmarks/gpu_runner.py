"""Part two of gpu_report: the torch runner with the kernel and a captured step, at the shapes of
Janus-Pro-1B and 7B. Weights are made on the device, so that nothing is exported or read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_part import Result, Task
from benchmarks.gpu_time import Rates
from ssd_export.config import ModelConfig
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import PUBLISHED
from ssd_export.noise import ImageSeed
from ssd_export.policy.make import make_policy
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.sampling import Sampling

SHAPES = ("janus-pro-1b", "janus-pro-7b")
BUDGETS = (("full", 1.0), ("h2o", 0.2))  # a fifth, all heads ranked: the dearest of the policies
BATCHES = (1, 8, 32, 128)
PROMPT_TOKENS = 24
SECONDS = {"janus-pro-1b": 12, "janus-pro-7b": 30}  # of a batch, about, 48 steps of it timed


@dataclass(frozen=True)
class StepTime:
    """One batch of a shape and policy. bound_ms: by the rates measured; bytes of the device."""

    shape: str
    policy: str
    batch: int
    ms_per_token: float
    bound_ms: float
    cache_bytes: int
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Image tokens a second, over all images of the batch."""
        return 1000 * self.batch / self.ms_per_token


def tasks(rates: Callable[[], Rates]) -> list[Task]:
    """Every shape, budget and batch. The model of a shape is made once."""
    models = _Models("cuda")
    return [
        Task(
            f"{shape}, {policy} {budget:g}, {batch} images",
            lambda shape=shape, policy=policy, budget=budget, batch=batch: measure(
                models(shape), shape, (policy, budget), batch, rates()
            ),
            SECONDS[shape],
        )
        for shape in SHAPES
        for batch in BATCHES
        for policy, budget in BUDGETS
    ]


class _Models:
    """The model of the shape asked for last."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._last: tuple[str, ImageTokenModel] | None = None

    def __call__(self, shape: str) -> ImageTokenModel:
        if self._last is None or self._last[0] != shape:
            self._last = None  # before the next is made: two may not fit
            self._last = shape, random_model(PUBLISHED[shape], self._device)
        return self._last[1]


def random_model(
    config: ModelConfig, device: str, dtype: torch.dtype = torch.float16
) -> ImageTokenModel:
    """A model with normal weights, scaled so that activations neither vanish nor overflow."""
    with torch.device("meta"):
        model = ImageTokenModel(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    numbers = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=numbers)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
    return model


def random_batch(config: ModelConfig, num_images: int) -> PromptBatch:
    """Prompts of PROMPT_TOKENS embeddings of random numbers."""
    rows = config.rows_per_image * num_images
    shape = (rows, PROMPT_TOKENS, config.condition_dim)
    embeds = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    lengths = np.full(rows, PROMPT_TOKENS, np.int32)
    images = tuple(ImageSeed(0, image) for image in range(num_images))
    return PromptBatch(embeds, lengths, images, (Sampling(),) * num_images)


def measure(
    model: ImageTokenModel,
    shape: str,
    policy: tuple[str, float],
    batch: int,
    rates: Rates,
    device: str = "cuda",
    runner_of: Callable[..., TorchRunner] = TorchRunner,
) -> Result:
    """The time of a step over two grid rows, after one in which kernels are compiled and the step
    is captured. Out of memory is the end of this batch alone.
    """
    config = model.config
    table = make_policy(policy[0], config, budget=policy[1], prompt_slots=PROMPT_TOKENS)
    runner = runner_of(model, None, table, device)
    width = config.grid.width
    try:
        torch.cuda.reset_peak_memory_stats()
        runner.prefill(random_batch(config, batch))
        runner.decode_row(range(1, width), ())
        ms = elapsed_ms(lambda: runner.decode_row(range(width, 3 * width), ())) / (2 * width)
        tokens = runner.tokens()[:, : 3 * width]
        failures = [] if len(np.unique(tokens)) > 1 else ["every token is the same"]
        time = StepTime(
            shape,
            f"{policy[0]} {policy[1]:g}",
            batch,
            ms,
            bound_ms(model, table, batch, runner.cache_bytes(), rates),
            runner.cache_bytes(),
            torch.cuda.max_memory_allocated(),
        )
        return {"ok": not failures, "failures": failures, "step": asdict(time)}
    except torch.cuda.OutOfMemoryError as error:
        return {"ok": True, "out_of_memory": str(error).splitlines()[0]}
    finally:
        runner.close()


def elapsed_ms(work: Callable[[], Any]) -> float:
    """Milliseconds between two CUDA events around the work."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def bound_ms(
    model: ImageTokenModel, table: PolicyTable, batch: int, cache_bytes: int, rates: Rates
) -> float:
    """The least a step can take: weights and caches read once, or its operations."""
    config = model.config
    rows = config.rows_per_image * batch
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and "generation_embeddings" not in name
    ]
    slots = sum(group.num_heads * group.num_slots for groups in table.layers for group in groups)
    attended = 2 * slots * config.query_group_size * config.head_dim
    operations = 2 * rows * (sum(matrix.numel() for matrix in matrices) + attended)
    num_bytes = sum(matrix.nbytes for matrix in matrices) + cache_bytes
    return 1000 * max(num_bytes / rates.read_bandwidth, operations / rates.matrix_rate)


COLUMNS = [
    "shape",
    "policy, budget",
    "images",
    "ms a token",
    "tokens/s",
    "bound ms",
    "share of bound",
    "caches MiB",
    "device MiB",
]


def table_rows(results: dict[str, Result]) -> list[list[str]]:
    """One row for each batch that was measured."""
    return [_row(StepTime(**result["step"])) for result in results.values() if "step" in result]


def _row(step: StepTime) -> list[str]:
    return [
        step.shape,
        step.policy,
        str(step.batch),
        f"{step.ms_per_token:.3f}",
        f"{step.tokens_per_second:,.0f}",
        f"{step.bound_ms:.3f}",
        f"{step.bound_ms / step.ms_per_token:.0%}",
        f"{step.cache_bytes / 2**20:,.0f}",
        f"{step.peak_bytes / 2**20:,.0f}",
    ]
