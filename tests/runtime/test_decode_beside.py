"""Images of one batch decoded while the tokens of the next are generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import ssd_export.runtime.ort_runner
from ssd_export.runtime.decode_beside import DecodeBeside
from ssd_export.runtime.generate import GenerationCancelledError, ImageGenerator
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint

THREE = dict(prompts=PROMPTS[:3], seed=1, max_batch=1)
WAIT_SECONDS = 30.0


class Undecodable(Exception):
    """What the decoder raises in these tests."""


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageGenerator]:
    """As on a machine with two cores."""
    monkeypatch.setattr(ssd_export.runtime.ort_runner, "num_cpus", lambda: 2)
    tiny = bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)
    with ImageGenerator.from_bundle(tiny) as opened:
        yield opened


@pytest.fixture
def held(generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Decoding in another thread begins once this is set."""
    gate, decode, main = threading.Event(), generator.runner.decode_image, threading.get_ident()

    def decode_image(tokens: np.ndarray) -> np.ndarray:
        if threading.get_ident() != main:
            assert gate.wait(WAIT_SECONDS)
        return decode(tokens)

    monkeypatch.setattr(generator.runner, "decode_image", decode_image)
    return gate


def test_the_next_batch_goes_on_meanwhile(generator: ImageGenerator, held: threading.Event) -> None:
    done: list[tuple[int, Image.Image]] = []
    seen = []
    final: list[Image.Image] = []
    events = generator.stream(**THREE, image_done=lambda *one: done.append(one))
    for number, event in enumerate(events):
        final = event.images or []
        seen.append(len(done))
        if number == 24 + 10:  # rows of the second batch were generated; the first waits
            assert done == []
            held.set()
    rows = generator.config.grid.height
    assert seen == sorted(seen)
    assert seen[2 * rows - 1] >= 1, "one batch is in flight, not two"
    assert seen[-1] == 3 and [number for number, _ in done] == [0, 1, 2]
    assert all(one is other for (_, one), other in zip(done, final, strict=True))


def test_images_are_those_of_one_thread(generator: ImageGenerator) -> None:
    assert generator.runner.decodes_beside_steps
    beside = generator(**THREE)
    with ImageGenerator.from_bundle(generator.bundle.path, num_threads=1) as alone:
        assert not alone.runner.decodes_beside_steps
        one_by_one = alone(**THREE)
    np.testing.assert_array_equal(beside.tokens, one_by_one.tokens)
    np.testing.assert_array_equal(beside.pixels, one_by_one.pixels)


def test_one_cpu_decodes_between_batches(
    generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_export.runtime.ort_runner, "num_cpus", lambda: 1)
    with ImageGenerator.from_bundle(generator.bundle.path) as alone:
        assert not alone.runner.decodes_beside_steps


def test_what_the_decoder_raises_ends_the_stream(
    generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: np.ndarray) -> np.ndarray:
        raise Undecodable

    monkeypatch.setattr(generator.runner, "decode_image", fail)
    with pytest.raises(Undecodable):
        generator(**THREE)
    monkeypatch.undo()
    assert len(generator([PROMPTS[0]]).images) == 1


def test_cancelling_waits_for_no_second_image(
    generator: ImageGenerator, held: threading.Event
) -> None:
    events = generator.stream(**THREE)
    for _ in range(25):
        next(events)
    generator.cancel()
    held.set()
    with pytest.raises(GenerationCancelledError):
        next(events)
    assert not [one for one in threading.enumerate() if one.name.startswith("ssd-export-decoder")]


def test_leaving_drops_what_has_not_begun() -> None:
    begun, gate = [], threading.Event()

    def decode(tokens: np.ndarray) -> np.ndarray:
        begun.append(len(tokens))
        gate.wait(WAIT_SECONDS)
        return np.zeros((len(tokens), 1, 1, 3), np.uint8)

    with DecodeBeside(decode) as beside:
        beside.add(np.zeros((5, 4), np.int32), 2)
        while not begun:
            pass
        assert list(beside.finished()) == []
        gate.set()
        assert len(list(beside.rest())) == 5
        gate.clear()
        beside.add(np.zeros((4, 4), np.int32), 1)
        while len(begun) < 4:
            pass
        threading.Timer(0.05, gate.set).start()
    assert begun == [2, 2, 1, 1]
