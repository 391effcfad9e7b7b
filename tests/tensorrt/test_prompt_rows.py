"""A prompt is computed once however many rows have it, and every row has its tokens, over doubles
of CUDA and TensorRT that execute.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_export.graph_spec import CacheTensor
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.sampling import Sampling
from ssd_export.tensorrt.prompt_rows import prompt_sizes, spreads
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, doubles
from tests.tensorrt.trt_double import ContextDouble


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_every_row_gets_its_prompt(prompts: list[int]) -> None:
    order = list(dict.fromkeys(prompts))  # as different_rows has them
    place = np.array([order.index(prompt) for prompt in prompts])
    rows = order + [-1] * (len(prompts) - len(order))
    for first, count, source in spreads(place):
        rows[first : first + count] = [rows[source]] * count
    assert rows == prompts


def test_rows_that_hold_their_prompt_are_not_copied() -> None:
    assert spreads(np.arange(6)) == []
    assert spreads(np.array([0, 1, 2, 2, 2])) == [(2, 3, 2)]
    assert spreads(np.array([0, 0, 1])) == [(2, 1, 1), (0, 2, 0)], "the row behind first"


def test_a_prefill_runs_at_few_sizes() -> None:
    sizes = [prompt_sizes(images) for images in (1, 2, 4, 128)]
    assert sizes == [[1], [1, 2], [1, 3, 4], [1, 65, 96, 128]]


def made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, **engines: object
) -> Doubles:
    return doubles(monkeypatch, copied_bundle(tmp_path, policy), images=(1, 1, 8), **engines)


def rows_of_prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every prefill from now on."""
    rows: list[int] = []
    run = ContextDouble._run

    def counted(self: ContextDouble, views: dict[str, np.ndarray]) -> None:
        if self._engine.graph.startswith("prefill"):
            rows.append(len(views["inputs_embeds"]))
        run(self, views)

    monkeypatch.setattr(ContextDouble, "_run", counted)
    return rows


CASES = {
    "one prompt": ([PROMPTS[0]] * 5, {}, [2]),
    "two in turn": ([PROMPTS[0], PROMPTS[1]] * 3, {}, [8]),
    "all different": (PROMPTS, {}, [2 * len(PROMPTS)]),
    "greedy": ([PROMPTS[0]] * 3, {"temperature": 0}, [2]),
    "top-k": ([PROMPTS[0]] * 3, {"top_k": 5}, [2]),
    "three negative prompts": (
        [PROMPTS[0]] * 3,
        {"negative_prompt": ["red", "blue", "red"]},
        [4],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["full", "ssd-row"])
def test_a_prompt_is_computed_once(
    policy: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, options, computed = CASES[case]
    over = made(tmp_path, monkeypatch, policy, top_k="top_k" in options)
    rows = rows_of_prefills(monkeypatch)
    reference = ImageGenerator.from_bundle(over.path, num_threads=1)
    wanted = reference(prompts, seed=3, **options).tokens
    with over.generator() as generator:
        np.testing.assert_array_equal(generator(prompts, seed=3, **options).tokens, wanted)
        for layer, groups in enumerate(generator.table.layers):
            for cache in (CacheTensor(layer, index, "position") for index in range(len(groups))):
                ours, theirs = (one.runner.read_cache(cache) for one in (generator, reference))
                np.testing.assert_array_equal(ours, theirs, cache.past)
    assert rows == computed
    assert over.cuda.used_bytes == 0 and not over.cuda.faults


@pytest.mark.slow
def test_a_row_that_shares_a_prompt_has_its_caches_and_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = made(tmp_path, monkeypatch, "h2o")
    batches = PromptBatches.from_bundle(over.bundle)
    batch = batches([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], Sampling(), seed=1)
    ours, reference = over.runner(), ImageGenerator.from_bundle(over.path, num_threads=1).runner
    with closing(ours):
        for runner in (ours, reference):
            runner.prefill(batch)
        np.testing.assert_array_equal(ours.tokens(), reference.tokens())
        np.testing.assert_allclose(ours.logits(), reference.logits(), atol=1e-4)
        caches = over.bundle.config.graphs["decode_step"].cache_inputs
        filled = {}
        for cache in caches:
            if cache.kind == "position":
                filled[cache.layer, cache.group] = reference.read_cache(cache) >= 0
                np.testing.assert_array_equal(ours.read_cache(cache), reference.read_cache(cache))
        for cache in caches:
            held = filled[cache.layer, cache.group]
            mine, theirs = ours.read_cache(cache), reference.read_cache(cache)
            np.testing.assert_allclose(mine[held], theirs[held], atol=1e-5)
            assert np.isfinite(mine).all(), "behind a shorter prompt, too"


@pytest.mark.slow
def test_an_engine_of_larger_batches_alone_computes_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied_bundle(tmp_path, "full")
    over = doubles(monkeypatch, path, images=(3, 3, 4), decoder_images=1)
    rows = rows_of_prefills(monkeypatch)
    with over.generator() as generator:
        generator([PROMPTS[0]] * 3, seed=3)
    assert rows == [6], "two images are fewer than the engine takes"
