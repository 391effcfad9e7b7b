"""ImageGenerator: callers who share one, options of every kind, numbers that are not finite."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_export.errors import UserError
from ssd_export.runtime.finite import NotFiniteError, to_pixels
from ssd_export.runtime.generate import ImageGenerator
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, scratch
from tests.scene_bundles import rewrite_manifest

TINY = TinyJanus(seed=3, num_kv_heads=2)
P, Q = PROMPTS[:2]


@pytest.fixture(scope="module")
def shared() -> Iterator[ImageGenerator]:
    with ImageGenerator.from_bundle(
        bundle(checkpoint(TINY), "h2o", 0.2), num_threads=1
    ) as generator:
        yield generator


@pytest.fixture(scope="module")
def alone(shared: ImageGenerator) -> dict[str, np.ndarray]:
    return {prompt: shared([prompt], seed=1).tokens for prompt in (P, Q)}


def test_threads_share_a_generator(shared: ImageGenerator, alone: dict[str, np.ndarray]) -> None:
    asked = [P, Q, P, Q]
    with ThreadPoolExecutor(len(asked)) as pool:
        done = list(pool.map(lambda prompt: shared([prompt], seed=1), asked))
    for prompt, result in zip(asked, done, strict=True):
        np.testing.assert_array_equal(result.tokens, alone[prompt])
        np.testing.assert_array_equal(
            np.asarray(result.images[0]), shared.runner.decode_image(alone[prompt])[0]
        )


def test_two_streams_of_a_thread_are_an_error_and_the_first_goes_on(
    shared: ImageGenerator, alone: dict[str, np.ndarray]
) -> None:
    first, second = shared.stream([P], seed=1), shared.stream([Q], seed=1)
    next(first)
    for call in (lambda: next(second), lambda: shared([Q])):
        with pytest.raises(UserError, match="in the middle of a stream of this thread"):
            call()
    *_, event = first
    np.testing.assert_array_equal(event.tokens, alone[P])
    np.testing.assert_array_equal(shared([Q], seed=1).tokens, alone[Q])


def test_an_abandoned_stream_is_in_nobody_s_way(
    shared: ImageGenerator, alone: dict[str, np.ndarray]
) -> None:
    next(shared.stream([Q]))
    unused = shared.stream([Q])
    np.testing.assert_array_equal(shared([P], seed=1).tokens, alone[P])
    unused.close()


def test_a_closed_generator_says_so() -> None:
    generator = ImageGenerator.from_bundle(bundle(checkpoint(TINY), "h2o", 0.2), num_threads=1)
    stream = generator.stream([P])
    next(stream)
    generator.close()
    for call in (lambda: next(stream), lambda: generator([P])):
        with pytest.raises(UserError, match="is closed; open another"):
            call()


def test_images_come_as_they_are_done(shared: ImageGenerator) -> None:
    """In order, of every batch, before the event that ends it."""
    done: list[tuple[int, Image.Image]] = []
    seen = []
    for event in shared.stream(
        [P, Q], num_images=2, max_batch=3, image_done=lambda *one: done.append(one)
    ):
        seen.append((event.row, len(done)))
    assert [count for _, count in seen] == [0] * 23 + [3] + [3] * 23 + [4]
    assert [number for number, _ in done] == [0, 1, 2, 3]
    for (_, image), final in zip(done, event.images, strict=True):
        assert image is final


def test_numbers_of_numpy_are_numbers(shared: ImageGenerator, alone: dict[str, np.ndarray]) -> None:
    result = shared(
        np.array([P]),
        seed=np.int64(1),
        num_images=np.uint8(1),
        max_batch=np.int32(4),
        cfg_scale=np.float32(5),
        temperature=np.float64(1),
        top_k=np.int16(0),
    )
    np.testing.assert_array_equal(result.tokens, alone[P])


@pytest.mark.parametrize(
    "options, fix",
    [
        (dict(prompts="a red circle"), "give a list such as"),
        (dict(prompts=b"a red circle"), "give a list such as"),
        (dict(prompts=None), "prompts is a NoneType; give a list of strings"),
        (dict(prompts=[None]), "a prompt is a NoneType, not a string"),
        (dict(prompts=[P, 3]), "a prompt is a int, not a string"),
        (dict(prompts=[]), "no prompt"),
        (dict(seed=-1), "seed -1 .* use a number such as 0"),
        (dict(seed=1.0), "seed 1.0"),
        (dict(seed=2**64), "seed"),
        (dict(num_images=0), "num_images 0 is below 1"),
        (dict(num_images=10**9), "num_images 1000000000 is above 100000"),
        (dict(prompts=[P] * 60_000, num_images=2), "call several times"),
        (dict(max_batch=1.5), "max_batch 1.5 is not a whole number"),
        (dict(decoder_batch="1"), "decoder_batch '1'"),
        (dict(cfg_scale=1e39), "cfg_scale 1e.39"),
        (dict(cfg_scale="5"), "cfg_scale '5' is not a number"),
        (dict(temperature=float("nan")), "temperature nan"),
        (dict(top_k=-1), "top_k -1 is below 0"),
    ],
)
def test_what_will_not_do_is_refused_when_it_is_asked_for(
    shared: ImageGenerator, options: dict[str, object], fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_batches", _Unchecked(shared._batches))
    with pytest.raises(UserError, match=fix):
        shared.stream(**{"prompts": [P], **options})


class _Unchecked:
    """Encodes one prompt of a long list of equal ones."""

    def __init__(self, batches: object) -> None:
        self._batches = batches

    def check(self, prompts: list[str]) -> None:
        self._batches.check(prompts[:1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_image(
    shared: ImageGenerator, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    logits = type(shared.runner).logits

    def broken(runner: object) -> np.ndarray:
        values = logits(runner)
        values[1, 7] = value
        return values

    monkeypatch.setattr(type(shared.runner), "logits", broken)
    with pytest.raises(NotFiniteError, match="logits of image token 23 are not finite: .*again"):
        shared([P])


def test_pixels_that_are_not_finite_are_no_image() -> None:
    levels = np.array([0.0, 254.99, 255.0], np.float32)
    np.testing.assert_array_equal(to_pixels(levels, "float16"), [0, 254, 255])
    with pytest.raises(NotFiniteError, match="pixels .* do not fit float16.*--dtype bf16"):
        to_pixels(np.array([1.0, np.nan], np.float32), "float16")


@pytest.mark.parametrize("runner", ["ort", "torch"])
def test_a_weight_that_is_not_finite_is_found_on_every_runner(
    runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the image decoder's last bias: tokens are as ever, the pixels are not."""
    path = scratch() / f"nan-{runner}"
    shutil.copytree(bundle(checkpoint(TINY), "h2o", 0.2), path)
    weights = path / "onnx/weights.safetensors"
    _overwrite(weights, "decoder.conv_out.bias", np.nan)
    rewrite_manifest(path)
    with ImageGenerator.from_bundle(path, runner=runner, num_threads=1) as generator:
        tokens = np.zeros((1, 576), np.int32)
        with pytest.raises(NotFiniteError, match="pixels of an image are not finite"):
            generator.runner.decode_image(tokens)


def _overwrite(path: Path, name: str, value: float) -> None:
    """Fills a float32 tensor of a safetensors file, in its place."""
    with path.open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        (entry,) = [entry for key, entry in header.items() if key.endswith(name)]
        first, end = entry["data_offsets"]
        file.seek(8 + header_bytes + first)
        file.write(np.full((end - first) // 4, value, np.float32).tobytes())
