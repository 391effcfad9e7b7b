"""The C++ library's TensorRT backend computes a prompt once however many rows of a batch have it:
Python's tokens, positions, caches and logits, over doubles that execute.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssd_export.bundle import Bundle
from ssd_export.dtypes import DTYPES
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.sampling import Sampling
from ssd_export.tensorrt.device_buffers import Buffer
from ssd_export.tensorrt.prompt_rows import CacheRows, prompt_runs
from tests.engines.builds import Builds, run
from tests.engines.test_tensorrt import calls_of
from tests.engines.trt_builds import TrtBuild, add_engines
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt.trt_bundles import copied_bundle

pytestmark = pytest.mark.slow

NUM_TOKENS, NUM_SLOTS, HEADS = 9, 20, 3


class Recorded:
    """A device that keeps the copies of cache rows, in rows. The cache is at address 0."""

    def __init__(self) -> None:
        self.copies: list[list[Any]] = []

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        is_of_prompts = source >= PROMPTS_AT
        source -= PROMPTS_AT if is_of_prompts else 0
        assert (pitch, source_pitch) == (4 * NUM_SLOTS, 4 * [NUM_SLOTS, NUM_TOKENS][is_of_prompts])
        to_row, from_row = target // pitch // HEADS, source // source_pitch // HEADS
        self.copies.append([to_row, from_row, rows // HEADS, width // 4, is_of_prompts])


PROMPTS_AT = 1 << 40


def python_copies(place: list[int], lengths: list[int]) -> dict[str, list[list[Any]]]:
    """What Python copies, in the words of engines/tests/prompt_rows.cpp."""
    buffer = Buffer(0, (len(place), HEADS, NUM_SLOTS), "int32")
    apart, together = Recorded(), Recorded()
    for one in prompt_runs(np.array(place), np.array(lengths)):
        CacheRows(apart, 0, buffer, NUM_TOKENS).fill(one, PROMPTS_AT)
    padded = prompt_runs(np.array(place), np.full(len(place), NUM_TOKENS))
    CacheRows(together, 0, buffer, NUM_TOKENS).spread(padded)
    return {"from_prompts": apart.copies, "in_place": together.copies}


def some_batches() -> list[tuple[list[int], list[int]]]:
    """Places and lengths of the rows of batches, with runs of every kind."""
    chance = random.Random(0)
    batches = [([0, 0], [3, 3]), ([0, 1, 0], [3, 3, 3]), ([0, 1, 2, 2, 3], [3, 4, 4, 4, 4])]
    for _ in range(400):
        prompts = [chance.randrange(6) for _ in range(chance.randrange(1, 24))]
        prompts = sorted(prompts) if chance.random() < 0.5 else prompts
        order = list(dict.fromkeys(prompts))
        batches.append(([order.index(one) for one in prompts], [3 + one % 3 for one in prompts]))
    return batches


def test_copies_are_pythons(build: Builds) -> None:
    """Which rows are copied where, in which order."""
    asked = some_batches()
    lines = [
        json.dumps({"place": place, "lengths": lengths, "num_tokens": NUM_TOKENS})
        for place, lengths in asked
    ]
    ran = run([build("release") / "tests" / "ssd_prompt_rows"], input="\n".join(lines))
    assert ran.returncode == 0, ran.stderr
    made = [json.loads(line) for line in ran.stdout.splitlines()]
    assert made == [python_copies(*one) for one in asked]


CASES: dict[str, tuple[list[str], dict[str, Any], list[int]]] = {
    "one prompt": ([PROMPTS[0]] * 5, {}, [2]),
    "two in turn": ([PROMPTS[0], PROMPTS[1]] * 3, {}, [8]),
    "all different": (PROMPTS, {}, [2 * len(PROMPTS)]),
    "greedy": ([PROMPTS[0]] * 3, {"temperature": 0.0}, [2]),
    "top-k": ([PROMPTS[0]] * 3, {"top_k": 5}, [2]),
    "every code": ([PROMPTS[0]] * 3, {"top_k": 100_000}, [2]),
    "three negative prompts": (
        [PROMPTS[0]] * 3,
        {"negative_prompt": ["red", "blue", "red"], "cfg_scale": 4.0},
        [4],
    ),
}
MANY = {"images": (1, 1, 8)}


def with_engines(trt: TrtBuild, folder: Path, policy: str, **engines: Any) -> Bundle:
    path = copied_bundle(folder, policy)
    return add_engines(path, trt, "tensorrt-rtx", **{**MANY, **engines})


def rows_of_prefills(folder: Path) -> list[int]:
    return [int(call.split()[-1]) for call in calls_of(folder) if "rows of prefill" in call]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["full", "ssd-row"])
def test_a_prompt_is_computed_once(policy: str, case: str, trt: TrtBuild, tmp_path: Path) -> None:
    prompts, options, computed = CASES[case]
    bundle = with_engines(trt, tmp_path, policy, top_k="top_k" in options)
    asked = {"backend": "tensorrt-rtx", "prompts": prompts, "seed": 3, "max_batch": 8, **options}
    slots = tmp_path / "slots"
    (made,) = trt.run(bundle.path, [asked], tmp_path, SSD_FAKE_SLOTS=str(slots))
    assert "error" not in made.facts, made.facts
    with ImageGenerator.from_bundle(bundle.path, num_threads=1) as reference:
        wanted = reference(prompts, seed=3, **options).tokens
        caches = [
            reference.runner.read_cache(cache)
            for cache in bundle.config.graphs["decode_step"].cache_inputs
            if cache.kind == "position"
        ]
    np.testing.assert_array_equal(made.tokens, wanted)
    found = np.fromfile(slots, np.int32)
    np.testing.assert_array_equal(found, np.concatenate([cache.reshape(-1) for cache in caches]))
    assert rows_of_prefills(tmp_path) == computed


@pytest.mark.parametrize("engines", [{}, {"fills_caches": False}, {"plugin": True}], ids=str)
def test_a_row_that_shares_a_prompt_has_its_caches_and_logits(
    engines: dict[str, bool], trt: TrtBuild, tmp_path: Path
) -> None:
    """Whether the prefill writes into the caches or its output is copied; in memory where longer
    prompts were before.
    """
    bundle = with_engines(trt, tmp_path, "h2o", **engines)
    long = f"{PROMPTS[0]} {PROMPTS[1]}"
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    asked = {"backend": "tensorrt-rtx", "seed": 1, "max_batch": 4, "first_row": True}
    before = {**asked, "prompts": [long, "a", f"{long} b", long]}
    file = tmp_path / "caches"
    for made in trt.run(
        bundle.path,
        [before, {**asked, "prompts": prompts}],
        tmp_path,
        SSD_FAKE_CACHES=str(file),
    ):
        assert "error" not in made.facts, made.facts
    assert rows_of_prefills(tmp_path)[-1] == 6, "three prompts, one of them the empty one"
    assert_caches_and_logits(bundle, prompts, file.read_bytes())


def assert_caches_and_logits(bundle: Bundle, prompts: list[str], content: bytes) -> None:
    """Compares what the double wrote after a prefill with ONNX Runtime's."""
    batch = PromptBatches.from_bundle(bundle)(prompts, Sampling(), seed=1)
    with ImageGenerator.from_bundle(bundle.path, num_threads=1) as reference:
        reference.runner.prefill(batch)
        start = 0
        for cache, tensor in bundle.config.graphs["decode_step"].cache_inputs.items():
            theirs = reference.runner.read_cache(cache)
            mine = np.frombuffer(content, DTYPES[tensor.dtype].numpy, theirs.size, start).reshape(
                theirs.shape
            )
            start += mine.nbytes
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=cache.past)
            assert cache.kind == "position" or not mine[theirs == 0].any(), "empty slots hold 0"
        logits = reference.runner.logits()
    mine = np.frombuffer(content, np.float32, logits.size, start).reshape(logits.shape)
    np.testing.assert_allclose(mine, logits, atol=1e-4)
    assert start + mine.nbytes == len(content)


def test_an_engine_of_larger_batches_alone_computes_every_row(
    trt: TrtBuild, tmp_path: Path
) -> None:
    bundle = with_engines(trt, tmp_path, "full", images=(3, 3, 4), decoder_images=1)
    asked = {"backend": "tensorrt-rtx", "prompts": [PROMPTS[0]] * 3, "first_row": True}
    (made,) = trt.run(bundle.path, [{**asked, "max_batch": 3}], tmp_path)
    assert "error" not in made.facts, made.facts
    assert rows_of_prefills(tmp_path) == [6], "two images are fewer than the engine takes"
