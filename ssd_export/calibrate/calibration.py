"""One streaming pass over images that the model generates: a head map with metric, statistics and
menu costs.

Generates a few images at a time with the full cache, then sends each through the layers once more,
teacher-forced, and adds up what `measure.py` sees. After every batch the sums are written beside
the head map, so that an interrupted run goes on where it stopped, to the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.calibrate.ablation import Ablation
from ssd_export.calibrate.measure import HeadSums, attention_shares
from ssd_export.calibrate.ranks import rank_correlation
from ssd_export.calibrate.sensitivity import Fisher, hidden_states
from ssd_export.calibrate.sequences import FullCacheImages, ImagesSpec, sequence_of
from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import prompt_encoder
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.table import HeadOption
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.sampling import Sampling

ABLATION, FISHER = "ablation", "fisher"  # how costs are found
BATCH = 4  # images generated together; the numbers depend on it by rounding only
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationSpec(ImagesSpec):
    """Settings of a calibration. options: what heads may get; costs: ABLATION or FISHER."""

    options: tuple[HeadOption, ...]
    costs: str = ABLATION

    def identity(self, fingerprint: str) -> str:
        """Equal for runs that give the same numbers: only such a run may be resumed."""
        values = [
            fingerprint,
            self.prompts_hash,
            self.num_images,
            str(self.neighborhood),
            self.seed,
            repr(self.sampling),
            self.prompt_slots,
            BATCH,
            repr(self.options),
            self.costs,
        ]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@dataclass
class CalibrationState:
    """State of a run: sums over the images so far, and the first image's tokens (for the plots)."""

    identity: str
    num_done: int
    first_image: np.ndarray
    sums: HeadSums

    def save(self, path: Path) -> None:
        """Whole or not at all: written beside, then renamed."""
        beside = path.with_name(path.name + ".new")
        with beside.open("wb") as file:
            arrays: dict[str, Any] = {
                "identity": self.identity,
                "num_done": self.num_done,
                "first_image": self.first_image,
                **self.sums.arrays(),
            }
            np.savez(file, **arrays)
        beside.replace(path)

    @classmethod
    def load(cls, path: Path, identity: str) -> CalibrationState | None:
        """The state in the file, if it is whole and of the same run."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            if str(values.pop("identity")) != identity:
                return None
            done, first = int(values.pop("num_done")), values.pop("first_image")
            return cls(identity, done, first, HeadSums(**values))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None


@dataclass(frozen=True)
class Calibration:
    """The finished run. first_image: int32 [image tokens]; stability: rank correlation of the
    metric between images of the prompts with even and with odd index, None with a single prompt.
    """

    head_map: HeadMap
    first_image: np.ndarray
    stability: float | None
    num_resumed: int


def calibrate(
    checkpoint: Checkpoint,
    model: ImageTokenModel,
    spec: CalibrationSpec,
    state_file: Path,
    *,
    threshold: float,
    tool_version: str,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Measures every head of a checkpoint; the same for the same spec, interrupted or not.

    Raises: UserError for prompts that do not fit, or a state file that cannot be written.
    """
    config = checkpoint.config
    fingerprint = checkpoint.fingerprint()
    encoder = prompt_encoder(config, checkpoint.file)
    images = FullCacheImages(model, encoder, spec.prompt_slots)
    encoder.encode(spec.prompts, spec.prompt_slots)
    identity = spec.identity(fingerprint)
    empty = CalibrationState(
        identity, 0, np.zeros(0, np.int32), HeadSums.zero(config, len(spec.options))
    )
    state = CalibrationState.load(state_file, identity) or empty
    num_resumed = state.num_done
    meter = _Meter(progress, spec, config, state.num_done)
    while state.num_done < spec.num_images:
        batch = range(state.num_done, min(state.num_done + BATCH, spec.num_images))
        prompts = [spec.prompts[i % len(spec.prompts)] for i in batch]
        started = images.batches(prompts, spec.sampling, spec.seed, batch.start)
        tokens = images(started, row_done=partial(meter.advance, len(batch)))
        if state.num_done == 0:
            state.first_image = tokens[0]
        for i in range(len(batch)):
            rows = rows_of(started, i, spec.sampling)
            add_image(state.sums, model, rows, tokens[i], spec, batch[i], meter.layer_done)
        state.num_done = batch.stop
        _save(state, state_file)
    head_map = _head_map(checkpoint, spec, state.sums, threshold, tool_version)
    return Calibration(head_map, state.first_image, stability_of(state.sums), num_resumed)


class _Meter:
    """Tells how much is done: an image counts one for each grid row generated and each layer passed
    in measuring it.
    """

    def __init__(
        self, progress: Progress, spec: CalibrationSpec, config: ModelConfig, num_done: int
    ) -> None:
        layers = range(config.num_layers)
        self._passed = [
            config.num_layers - layer if spec.costs == ABLATION else 1 for layer in layers
        ]
        each = config.grid.height + sum(self._passed)
        self._progress, self._done, self._total = progress, num_done * each, spec.num_images * each
        self.advance(0)

    def advance(self, count: int) -> None:
        self._done += count
        self._progress("measuring heads", self._done, self._total)

    def layer_done(self, layer: int) -> None:
        self.advance(self._passed[layer])


def _save(state: CalibrationState, path: Path) -> None:
    try:
        state.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another --out") from error


def rows_of(batch: PromptBatch, image: int, sampling: Sampling) -> list[np.ndarray]:
    """Embeddings float32 [L, condition_dim] of an image's rows: the conditional one and, where
    guidance reads it, the unconditional one.
    """
    rows = range(image, len(batch.lengths), batch.num_images)
    read = rows[:1] if sampling.cfg_scale == 1 else rows
    return [batch.embeds[row, : batch.lengths[row]] for row in read]


def add_image(
    sums: HeadSums,
    model: ImageTokenModel,
    prompts: Sequence[np.ndarray],
    tokens: np.ndarray,
    spec: CalibrationSpec,
    number: int = 0,
    layer_done: Callable[[int], None] = lambda layer: None,
) -> None:
    """Adds one image's numbers, from the last layer to the first: one layer's attention is in
    memory at a time.

    Args: prompts: embeddings of its conditional and, where there is guidance, its unconditional
    row, as `rows_of` gives them; tokens int [image tokens]; number: of the image, which decides
    what half its metric counts for and, with
    the seed, the signs of Fisher's gradient.
    """
    start, half = len(prompts[0]), (number % len(spec.prompts)) % 2
    states = hidden_states(model, sequence_of(model, prompts, tokens), start)
    costs: Ablation | Fisher
    if spec.costs == ABLATION:
        costs = Ablation(model, states.pop(), start, spec.sampling)
    else:
        costs = Fisher(
            model, states.pop(), start, spec.sampling, np.random.default_rng([spec.seed, number])
        )
    for index in reversed(range(model.config.num_layers)):
        dense, divergence = costs.layer(index, states.pop(), spec.options, spec.prompt_slots)
        metric, on_prompt, columns = attention_shares(dense, spec.neighborhood)
        sums.metric[half, index] += metric.numpy()
        sums.prompt_share[index] += on_prompt.numpy()
        sums.column_share[index] += columns.numpy()
        sums.divergence[index] += divergence.numpy()
        del dense  # else it would still be there while the next layer is measured
        layer_done(index)
    sums.num_images[half] += 1


def stability_of(sums: HeadSums) -> float | None:
    """Rank correlation of the metric between halves of the images; None with one image."""
    if not sums.num_images.all():
        return None
    halves = sums.metric / sums.num_images[:, None, None]
    return rank_correlation(halves[0], halves[1])


def _head_map(
    checkpoint: Checkpoint,
    spec: CalibrationSpec,
    sums: HeadSums,
    threshold: float,
    tool_version: str,
) -> HeadMap:
    config, total = checkpoint.config, sums.total
    metric = np.clip(sums.mean_metric(), 0, 1)
    statistics = {
        "num_images": spec.num_images,
        "seed": spec.seed,
        "costs": spec.costs,
        "prompt_slots": spec.prompt_slots,
        "cfg_scale": spec.sampling.cfg_scale,
        "temperature": spec.sampling.temperature,
        "stability": stability_of(sums),
        "prompt_share": _rounded(sums.prompt_share / total),
        "column_share": _rounded(sums.column_share / total),
    }
    return HeadMap(
        config.family,
        config.grid,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.hidden_size,
        metric=_tuples(metric),
        threshold=threshold,
        neighborhood=str(spec.neighborhood),
        provenance="measured by ssd-export calibrate",
        prompts_hash=spec.prompts_hash,
        model_fingerprint=checkpoint.fingerprint(),
        tool_version=tool_version,
        cost_options=spec.options,
        costs=_tuples(sums.costs()),
        statistics=statistics,
    ).validate()


def _tuples(values: np.ndarray) -> tuple:
    """Nested tuples of floats with 7 digits: more would be noise, and is what a file would be full
    of.
    """
    if values.ndim == 1:
        return tuple(float(f"{value:.7g}") for value in values)
    return tuple(map(_tuples, values))


def _rounded(values: np.ndarray) -> list:
    return np.round(values, 5).tolist()
