"""Pixels of a batch beside the tokens of the next: the same images in the same order, failures
alone, one batch in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ssd_export.errors import UserError
from ssd_export.noise import ImageSeed
from ssd_export.prompt_files.tasks import ImageTask
from ssd_export.prompt_files.worker import Outcome, OverlappedImages, make_images
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import ImageRequest
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

TASKS = [
    ImageTask(line, 0, ImageRequest("a red circle", Sampling(), ImageSeed(3, line)))
    for line in range(1, 8)
]
BATCHES = [TASKS[start : start + 2] for start in range(0, len(TASKS), 2)]
WAIT = 60.0  # seconds, for what should happen at once
Decode = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def generator() -> Iterator[ImageGenerator]:
    path = bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)
    with ImageGenerator.from_bundle(path, num_threads=1) as opened:
        opened.runner.decodes_beside_steps = True
        yield opened


def overlapped(generator: ImageGenerator) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with OverlappedImages(generator, outcomes.append) as images:
        for batch in BATCHES:
            images.make(batch)
        images.finish()
    return outcomes


def test_the_same_files_in_the_same_order(generator: ImageGenerator) -> None:
    one_by_one: list[Outcome] = []
    for batch in BATCHES:
        make_images(generator, batch, one_by_one.append)
    assert overlapped(generator) == one_by_one
    assert [outcome.task for outcome in one_by_one] == TASKS and one_by_one[-1].png


def test_tokens_go_on_while_pixels_are_made_one_batch_behind(
    generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Semaphore(0), []
    decode, prefill = generator.runner.decode_image, generator.runner.prefill

    def waiting(tokens: np.ndarray) -> np.ndarray:
        assert go.acquire(timeout=WAIT)
        return decode(tokens)

    def counting(batch: object) -> None:
        begun.append(len(outcomes))
        if len(begun) == 2:  # nothing of the first batch is there, and its pixels may come now
            go.release(len(TASKS))
        prefill(batch)

    monkeypatch.setattr(generator.runner, "decode_image", waiting)
    monkeypatch.setattr(generator.runner, "prefill", counting)
    outcomes: list[Outcome] = []
    with OverlappedImages(generator, outcomes.append) as images:
        for number, batch in enumerate(BATCHES):
            images.make(batch)
            assert len(outcomes) >= 2 * number, "more than one batch waits"
        images.finish()
    assert begun[:2] == [0, 0] and [outcome.task for outcome in outcomes] == TASKS


@pytest.mark.parametrize("times", [1, 2])
def test_an_image_that_fails_is_tried_again_and_then_fails_alone(
    times: int, generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {outcome.task: outcome for outcome in overlapped(generator)}
    bad = TASKS[2]
    left, decode = [times], generator.decode_tokens
    images: dict[bytes, ImageTask] = {}

    def noting(self: ImageGenerator, tokens: np.ndarray) -> object:
        images[tokens.tobytes()] = TASKS[len(images)]
        return decode(tokens)

    monkeypatch.setattr(ImageGenerator, "decode_tokens", noting)
    overlapped(generator)
    monkeypatch.undo()
    decode_image = generator.runner.decode_image

    def failing(tokens: np.ndarray) -> np.ndarray:
        if images[tokens[0].tobytes()] == bad and left[0]:
            left[0] -= 1
            raise UserError("no memory for pixels")
        return decode_image(tokens)

    generator.runner.decodes_beside_steps = True
    monkeypatch.setattr(generator.runner, "decode_image", failing)
    made = {outcome.task: outcome for outcome in overlapped(generator)}
    assert made.keys() == whole.keys(), "no image is lost"
    if times == 2:
        assert made.pop(bad).error == "no memory for pixels" and whole.pop(bad).png
    assert made == whole


def test_a_batch_whose_tokens_fail_keeps_the_one_before(
    generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = generator.runner.prefill

    def failing(batch: object) -> None:
        if ImageSeed(3, 4) in batch.images:  # type: ignore[attr-defined]
            raise RuntimeError("no such luck")
        prefill(batch)

    monkeypatch.setattr(generator.runner, "prefill", failing)
    outcomes = overlapped(generator)
    assert [outcome.task for outcome in outcomes] == TASKS
    errors = [outcome.error for outcome in outcomes]
    assert errors[3] == "RuntimeError: no such luck" and not any(errors[:3] + errors[4:])


def test_what_cannot_be_written_ends_the_work(generator: ImageGenerator) -> None:
    def full(outcome: Outcome) -> None:
        raise UserError("no space left")

    with pytest.raises(UserError, match="no space left"), OverlappedImages(generator, full) as it:
        for batch in BATCHES:
            it.make(batch)
    assert generator([TASKS[0].prompt]).images, "the generator is free again"
