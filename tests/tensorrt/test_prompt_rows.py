"""A prompt is computed once however many rows have it, and every row has its tokens, over doubles
of CUDA and TensorRT that execute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from ssd_export.tensorrt.device_buffers import Buffer
from ssd_export.tensorrt.prompt_rows import CacheRows, PromptRun, prompt_runs, prompt_sizes
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, doubles
from tests.tensorrt.trt_double import ContextDouble


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=40))
def test_every_row_gets_its_prompt_once(prompts: list[tuple[int, int]]) -> None:
    """Prompts as (number, whether long); every run is within one length."""
    order = list(dict.fromkeys(prompts))  # as different_rows has them
    place = np.array([order.index(prompt) for prompt in prompts])
    lengths = np.array([7 + is_long for _, is_long in prompts])
    rows: list[tuple[int, int]] = []
    for run in prompt_runs(place, lengths):
        assert run.first == len(rows)
        steps = [0] * run.count if run.is_one_prompt else range(run.count)
        rows += [order[run.place + step] for step in steps]
        assert {7 + is_long for _, is_long in rows[run.first :]} == {run.length}
    assert rows == prompts


def test_runs_are_as_long_as_they_can_be() -> None:
    def runs(
        place: list[int], lengths: list[int] | None = None
    ) -> list[tuple[int, int, int, bool]]:
        found = prompt_runs(np.array(place), np.array(lengths or [7] * len(place)))
        return [(run.first, run.count, run.place, run.is_one_prompt) for run in found]

    assert runs([0, 1, 2]) == [(0, 3, 0, False)]
    assert runs([0, 1, 2, 3, 3, 3]) == [(0, 4, 0, False), (4, 2, 3, True)]
    assert runs([0, 0, 0, 1, 1, 1]) == [(0, 3, 0, True), (3, 3, 1, True)]
    assert runs([0, 1, 0]) == [(0, 2, 0, False), (2, 1, 0, False)]
    assert runs([0, 1, 2], [7, 7, 9]) == [(0, 2, 0, False), (2, 1, 2, False)]


class Rows:
    """Device memory of four bytes a row, where a copy may not read what it writes."""

    def __init__(self, rows: Iterable[int]) -> None:
        self.memory = np.array(list(rows), np.int32).view(np.uint8)

    def copy_rows(self, *numbers: int) -> None:
        target, target_pitch, source, source_pitch, width, rows = numbers
        assert abs(target - source) >= rows * target_pitch, "a copy over itself"
        for row in range(rows):
            start, end = source + row * source_pitch, target + row * target_pitch
            self.memory[end : end + width] = self.memory[start : start + width]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.booleans())
def test_prompts_spread_from_the_first_rows_of_a_cache(prompts: list[int], sort: bool) -> None:
    """Each row of a cache, here one slot of four bytes, ends with its prompt."""
    prompts = sorted(prompts) if sort else prompts
    order = list(dict.fromkeys(prompts))  # as different_rows has them
    place = np.array([order.index(prompt) for prompt in prompts])
    device = Rows([*order, *[-1] * (len(prompts) - len(order))])
    cache = CacheRows(device, 0, Buffer(0, (len(prompts), 1, 1), "int32"), num_tokens=1)
    cache.spread(prompt_runs(place, np.ones(len(prompts))))
    assert device.memory.view(np.int32).tolist() == prompts


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
@pytest.mark.parametrize("engines", [{}, {"fills_caches": False}, {"plugin": True}], ids=str)
def test_a_row_that_shares_a_prompt_has_its_caches_and_logits(
    engines: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the prefill writes into the caches or its output is copied."""
    over = made(tmp_path, monkeypatch, "h2o", **engines)
    assert_caches_and_logits_are_onnx_runtime_s(over)


def assert_caches_and_logits_are_onnx_runtime_s(over: Doubles) -> None:
    """After the prefill of four images, two batches of which the first has longer prompts."""
    batches = PromptBatches.from_bundle(over.bundle)
    long = f"{PROMPTS[0]} {PROMPTS[1]}"
    before = batches([long, "a", f"{long} b", long], Sampling(), seed=1)
    batch = batches([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], Sampling(), seed=1)
    ours, reference = over.runner(), ImageGenerator.from_bundle(over.path, num_threads=1).runner
    with closing(ours):
        ours.prefill(before)
        for runner in (ours, reference):
            runner.prefill(batch)
        np.testing.assert_array_equal(ours.tokens(), reference.tokens())
        np.testing.assert_allclose(ours.logits(), reference.logits(), atol=1e-4)
        for cache in over.bundle.config.graphs["decode_step"].cache_inputs:
            mine, theirs = ours.read_cache(cache), reference.read_cache(cache)
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
            assert cache.kind == "position" or not mine[theirs == 0].any(), "empty slots hold 0"


NOTICED = "Not equal to tolerance|empty slots hold 0"


def _not_written(cache: np.ndarray, before: np.ndarray) -> None:
    cache[:] = before


def _one_slot_later(cache: np.ndarray, before: np.ndarray) -> None:
    cache[:] = np.roll(cache, 1, axis=2)


def _one_row_later(cache: np.ndarray, before: np.ndarray) -> None:
    cache[:] = np.roll(cache, 1, axis=0)


def _padding_kept(cache: np.ndarray, before: np.ndarray) -> None:
    cache[:] = np.where(cache == 0, np.float32(0.5), cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(
    "fault",
    [_not_written, _one_slot_later, _one_row_later, _padding_kept],
    ids=lambda fault: fault.__name__.strip("_"),
)
def test_an_engine_that_writes_its_prompts_otherwise_is_noticed(
    fault: Callable[[np.ndarray, np.ndarray], None],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ContextDouble._run

    def faulty(self: ContextDouble, views: dict[str, np.ndarray]) -> None:
        caches = self._engine.aliases.items() if self._engine.graph == "prefill" else ()
        before = {present: views[past].copy() for present, past in caches}
        run(self, views)
        for present, values in before.items():
            if present.endswith(f"1.0.{kind}"):
                fault(views[present], values)

    monkeypatch.setattr(ContextDouble, "_run", faulty)
    with pytest.raises(AssertionError, match=NOTICED):
        assert_caches_and_logits_are_onnx_runtime_s(made(tmp_path, monkeypatch, "h2o"))


def _rows_in_order(self: CacheRows, runs: Sequence[PromptRun]) -> None:
    """From the first row on, which overwrites what later rows are copied from."""
    for run in runs:
        if run.is_one_prompt:
            self._copy_down(run, run.first, 1, run.first - run.place)
            self._double(run, 1)
        else:
            self._copy_down(run, run.first, run.count, run.first - run.place)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [_rows_in_order, lambda self, runs: None], ids=["order", "none"])
def test_rows_that_share_a_prompt_and_do_not_get_it_are_noticed(
    spread: Callable[[CacheRows, Sequence[PromptRun]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CacheRows, "spread", spread)
    with pytest.raises(AssertionError, match=NOTICED):
        assert_caches_and_logits_are_onnx_runtime_s(made(tmp_path, monkeypatch, "h2o"))


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
