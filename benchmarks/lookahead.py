"""Lookahead beside one token at a time: the same tokens and slots, how many passes, what time.

    python -m benchmarks.lookahead [--captions 64] [--passes 300] [--rounds 7]
        [--caches "full,0.2,0.2 for 8"] [--windows 4,8,16,24]

Captions are those of held-out scenes of the demo model; caches are full and ssd-auto at 0.2 and
0.1, heads evicting each for itself and for lookahead (export --lookahead off, 8, 16 and 24). Tokens
and slots are compared with single steps of the same runner, for batch 1 the slots after every pass.
Where an image is parted from its twin, the margin is that of the two best codes of the race where
they part. Passes are counted with sampling as the demo does it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.graph_spec import CacheTensor
from ssd_export.metrics.scene_score import draw_scenes
from ssd_export.noise import GumbelNoise
from ssd_export.policy.usual import EACH_FOR_ITSELF
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.draw import race_of
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.lookahead import DRAFTS, WINNER, Lookahead
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches, bundle_sampling

OUT = Path("docs/measurements/lookahead.json")
PLAIN = {
    "full": PolicyChoice(policy="full", budget=1.0),
    "0.2": PolicyChoice(budget=0.2, lookahead=EACH_FOR_ITSELF),
    "0.1": PolicyChoice(budget=0.1, lookahead=EACH_FOR_ITSELF),
}
FOR_LOOKAHEAD = {
    f"{budget} for {tokens}": PolicyChoice(budget=budget, lookahead=tokens)
    for budget in (0.2, 0.1)
    for tokens in (8, 16, 24)
}
CACHES = PLAIN | FOR_LOOKAHEAD
WINDOWS = (4, 8, 16, 24)
MODES = {"sampled": {}, "greedy": {"temperature": 0.0}, "top-k 50": {"top_k": 50}}
SPEED_WINDOWS = (4, 6, 8, 16)
EQUALITY_COLUMNS = (
    "cache",
    "tokens are",
    "batch",
    "window",
    "images",
    "same 576 tokens",
    "parted at a near tie",
    "greatest margin there",
    "same tokens, another slot",
    "passes of a batch",
)
PASSES_COLUMNS = ("cache", "draft", "window", "images", "passes", "most", "tokens a pass")
SPEED_COLUMNS = ("cache", "lookahead", "images", "ms", "CPU ms", "times faster", "by CPU time")


@dataclass
class Table:
    """A table that grows."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The figures as measurements have them."""
        return table(self.title, self.columns, self.rows)


@dataclass
class Steps:
    """Results of single steps: tokens and the margin of every draw [N, image tokens], slots after
    the last step, and after each where they were asked for.
    """

    tokens: np.ndarray
    margins: np.ndarray
    slots: list[np.ndarray]
    after: dict[int, list[np.ndarray]] = field(default_factory=dict)


@dataclass
class Equality:
    """Counts over the images of a row of the table."""

    images: int = 0
    same: int = 0
    parted_margins: list[float] = field(default_factory=list)
    other_slots: int = 0  # images with the same tokens and another slot somewhere
    passes: list[int] = field(default_factory=list)


@contextmanager
def opened(cache: str) -> Iterator[ImageGenerator]:
    """A generator for the demo under a cache, ONNX Runtime on one thread."""
    with (
        temporary_bundle(CACHES[cache]) as path,
        ImageGenerator.from_bundle(path, "ort", num_threads=1) as generator,
    ):
        yield generator


def batches(
    generator: ImageGenerator, captions: Sequence[str], size: int, mode: str
) -> Iterator[PromptBatch]:
    """The captions in batches; image i has its number's random numbers."""
    sampling = bundle_sampling(generator.bundle)
    sampling = replace(sampling, **MODES[mode])  # type: ignore[arg-type]
    make = PromptBatches.from_bundle(generator.bundle)
    for start in range(0, len(captions), size):
        yield make(captions[start : start + size], sampling, 0, start)


def slots_of(generator: ImageGenerator) -> list[np.ndarray]:
    """Positions of every group's slots."""
    runner = generator.runner
    assert isinstance(runner, OrtRunner)
    return [
        runner.read_cache(CacheTensor(layer, index, "position"))
        for layer, groups in enumerate(generator.table.layers)
        for index in range(len(groups))
    ]


def one_by_one(generator: ImageGenerator, batch: PromptBatch, every_step: bool) -> Steps:
    """Single steps, the reference."""
    num_tokens = generator.table.grid.num_tokens
    margins = np.zeros((batch.num_images, num_tokens), np.float32)
    noise = GumbelNoise(batch.images, generator.config.codebook_size)
    after = {}
    parts = single_steps(num_tokens)
    for steps in decode(generator.runner, batch, generator.table, parts):
        race = race_of(generator.runner.logits(), noise(steps)[0], batch.sampling_inputs())
        best = np.partition(race, -2, axis=1)[:, -2:]
        margins[:, steps.start] = best[:, 1] - best[:, 0]
        if every_step:
            after[steps.stop] = slots_of(generator)
    return Steps(generator.runner.tokens(), margins, slots_of(generator), after)


def compare(
    generator: ImageGenerator, batch: PromptBatch, window: int, steps: Steps, found: Equality
) -> None:
    """Adds a batch to the counts."""
    codes = generator.config.codebook_size
    ahead = Lookahead(generator.runner, batch, generator.table, window, codes)
    slots_differ = np.zeros(batch.num_images, bool)
    runner = generator.runner
    decode_window = runner.decode_window

    def watched(first: np.ndarray, *rest: Any) -> tuple[np.ndarray, np.ndarray]:
        sampled, counts = decode_window(first, *rest)
        reached = int(first[0] + counts[0])
        slots_differ[0] |= not equal(slots_of(generator), steps.after[reached], [0, 1])
        return sampled, counts

    if steps.after:
        runner.decode_window = watched  # type: ignore[method-assign]
    try:
        for _ in ahead:
            pass
    finally:
        runner.decode_window = decode_window  # type: ignore[method-assign]
    tokens, slots = runner.tokens(), slots_of(generator)
    found.passes.append(ahead.passes)
    for image in range(batch.num_images):
        found.images += 1
        different = np.flatnonzero(tokens[image] != steps.tokens[image])
        if len(different):
            found.parted_margins.append(float(steps.margins[image, different[0]]))
            continue
        found.same += 1
        rows = [image, image + batch.num_images]
        found.other_slots += bool(slots_differ[image]) or not equal(slots, steps.slots, rows)


def equal(ours: list[np.ndarray], theirs: list[np.ndarray], rows: list[int]) -> bool:
    """Whether the rows of all groups are equal."""
    return all(np.array_equal(a[rows], b[rows]) for a, b in zip(ours, theirs, strict=True))


def equality_rows(
    captions: Sequence[str], cache: str, mode: str, windows: Sequence[int]
) -> list[list[Any]]:
    """A row for each batch and window."""
    rows = []
    with opened(cache) as generator:
        for size in (1, 8):
            found = {window: Equality() for window in windows}
            for batch in batches(generator, captions, size, mode):
                steps = one_by_one(generator, batch, every_step=size == 1)
                for window in windows:
                    compare(generator, batch, window, steps, found[window])
            rows += [[cache, mode, size, w, *summary(e)] for w, e in found.items()]
            say(f"{rows[-len(windows) :]}")
    return rows


def summary(found: Equality) -> list[Any]:
    """The last cells of a row of the table."""
    margin = f"{max(found.parted_margins):.1e}" if found.parted_margins else "-"
    parted = found.images - found.same
    return [
        found.images,
        found.same,
        parted,
        margin,
        found.other_slots,
        round(statistics.fmean(found.passes), 1),
    ]


def passes_rows(
    captions: Sequence[str], cache: str, drafts: Sequence[str], windows: Sequence[int]
) -> list[list[Any]]:
    """Mean and most passes of an image, by first draft and window."""
    rows = []
    with opened(cache) as generator:
        every = list(batches(generator, captions, 1, "sampled"))
        for draft in drafts:
            for window in windows:
                passes = [passes_of(generator, batch, window, draft) for batch in every]
                mean, most = round(statistics.fmean(passes), 1), max(passes)
                gained = round((generator.table.grid.num_tokens - 1) / mean, 2)
                rows.append([cache, draft, window, len(passes), mean, most, gained])
                say(str(rows[-1]))
    return rows


def passes_of(generator: ImageGenerator, batch: PromptBatch, window: int, draft: str) -> int:
    """Decode passes of a batch."""
    codes = generator.config.codebook_size
    ahead = Lookahead(generator.runner, batch, generator.table, window, codes, draft)
    for _ in ahead:
        pass
    return ahead.passes


def speed_rows(captions: Sequence[str], cache: str, rounds: int) -> list[list[Any]]:
    """Whole images, image decoder included: off and windows in turns, a caption a round."""
    rows = []
    times: dict[int, list[tuple[float, float]]] = {w: [] for w in (1, *SPEED_WINDOWS)}
    with opened(cache) as generator:
        for number in range(rounds + 1):
            for window, own in times.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                generator([captions[number % len(captions)]], seed=number, lookahead=window)
                own.append((time.perf_counter() - began, time.process_time() - cpu_began))
    off = times[1][1:]  # the first round opens the graphs
    for window, own in times.items():
        pairs = list(zip(off, own[1:], strict=True))
        faster = [statistics.median(a[clock] / b[clock] for a, b in pairs) for clock in (0, 1)]
        medians = [1000 * statistics.median(t[clock] for t in own[1:]) for clock in (0, 1)]
        name = "off" if window == 1 else str(window)
        rows.append([cache, name, rounds, *map(round, medians), *(f"{f:.2f}" for f in faster)])
        say(str(rows[-1]))
    return rows


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--captions", type=int, default=64, help="of the sampled equality rows")
    parser.add_argument("--others", type=int, default=16, help="of the greedy and top-k rows")
    parser.add_argument("--drafts", type=int, default=16, help="of the table of drafts")
    parser.add_argument(
        "--passes", type=int, default=300, help="of the passes at the default draft"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of the times")
    parser.add_argument("--caches", default=",".join(CACHES), help="comma-separated; default: all")
    parser.add_argument("--windows", default=",".join(map(str, WINDOWS)))
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    windows = [int(window) for window in asked.windows.split(",")]
    caches = asked.caches.split(",")
    if unknown := set(caches) - set(CACHES):
        parser.error(f"no cache {', '.join(unknown)}; choose of {', '.join(CACHES)}")
    captions = [scene.caption for scene in draw_scenes(max(asked.captions, asked.passes), 0)]
    own = captions[: asked.captions]
    speed = Table("Time of an image", SPEED_COLUMNS)
    passes = Table("Passes of an image", PASSES_COLUMNS)
    equality = Table("Tokens and slots beside single steps", EQUALITY_COLUMNS)
    command = shlex.join(["python", "-m", "benchmarks.lookahead", *sys.argv[1:]])

    def write() -> None:
        """Writes the file after every block: whatever ends the run leaves what was measured."""
        tables = [one.as_dict() for one in (equality, passes, speed) if one.rows]
        write_measurement(asked.out, measurement(command, {"tables": tables}, asked.note))

    for cache in caches if asked.rounds else ():
        speed.rows += speed_rows(captions, cache, asked.rounds)
        write()
    for cache in caches:
        if asked.passes:
            passes.rows += passes_rows(captions[: asked.passes], cache, (WINNER,), windows)
        if asked.drafts and cache in ("full", "0.2"):
            passes.rows += passes_rows(captions[: asked.drafts], cache, DRAFTS, windows)
        write()
    for mode in MODES:
        some = own[: None if mode == "sampled" else asked.others]
        for cache in caches if some else ():
            if mode == "sampled" or cache in PLAIN:
                equality.rows += equality_rows(some, cache, mode, windows)
                write()


if __name__ == "__main__":
    main()
