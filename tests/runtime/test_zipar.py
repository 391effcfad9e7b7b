"""Grid rows in parallel: the schedule, single steps as its limit, and an oracle that attends by a
mask over the whole sequence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_export.bundle import open_bundle, read_config
from ssd_export.bundle.graphs import keeps_rows
from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.noise import GumbelNoise
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches, bundle_sampling
from ssd_export.runtime.torch_weights import load_modules
from ssd_export.runtime.zipar import ParallelRows, RowsNoise, passes_of
from ssd_export.sampling import rows_start
from ssd_export.tensorrt.runner import TrtRunner
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, export_spec, scratch
from tests.runtime.near_ties import assert_same_tokens

GRIDS = ((24, 24), (3, 5), (1, 4), (4, 1))
RUNNERS = ("ort", "torch")


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_every_token_is_sampled_once_after_what_it_reads(shape: tuple[int, int]) -> None:
    grid = Grid(*shape)
    for start in range(1, grid.width + 1):
        done, stand_ins = {0}, set()
        passes = list(passes_of(grid, start))
        assert len(passes) == (grid.height - 1) * start + grid.width - 1
        for places in passes:
            for place in places:
                assert place.source in done
                row, column = divmod(place.step, grid.width)
                if place.is_new and column and place.step not in done:
                    assert place.source == place.step - 1
                elif place.is_new:
                    newest = max(token for token in done if token // grid.width == row - 1)
                    assert column == 0 and place.source == newest
                    stand_ins |= {place.step - 1} - {place.source}
                else:
                    assert place.source == place.step - 1
                    stand_ins.remove(place.source)
            new = [place.step for place in places if place.is_new]
            assert not done & set(new) and len(set(new)) == len(new)
            assert len({place.step for place in places}) == len(places)  # each has its own slot
            done |= set(new)
        assert done == set(range(grid.num_tokens)) and not stand_ins


def bundle_of(policy: str = "full", **changes: object) -> Path:
    return bundle(checkpoint(TinyJanus(seed=5, num_layers=2)), policy, **changes)


def opened(runner: str, path: Path | None = None) -> ImageGenerator:
    return ImageGenerator.from_bundle(path or bundle_of(), runner=runner, num_threads=1)


def batch_of(generator: ImageGenerator, num_images: int, **sampling: float) -> PromptBatch:
    numbers = bundle_sampling(generator.bundle).changed(**sampling)
    return PromptBatches.from_bundle(generator.bundle)(PROMPTS[:num_images], numbers, 3)


def run(generator: ImageGenerator, batch: PromptBatch, start: int) -> ParallelRows:
    codes = generator.config.codebook_size
    rows = ParallelRows(generator.runner, batch, generator.table, start, codes)
    grid = generator.config.grid
    wanted = [range(1), range(1, grid.width)]
    wanted += [range(s, s + grid.width) for s in range(grid.width, grid.num_tokens, grid.width)]
    assert list(rows) == wanted
    return rows


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_start_of_the_whole_row_gives_the_tokens_of_single_steps(
    runner: str, sampling: dict[str, float]
) -> None:
    with opened(runner) as generator:
        batch = batch_of(generator, 2, **sampling)
        for _ in decode(generator.runner, batch, generator.table):
            pass
        one_by_one = generator.runner.tokens(), generator
        rows = run(generator, batch, generator.config.grid.width)
        assert rows.passes == 575 and rows.accepted == 2 * 575
        assert_same_tokens((generator.runner.tokens(), generator), one_by_one, batch)


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_tokens_are_those_of_a_masked_sequence(runner: str) -> None:
    """The oracle keeps no cache: in every pass it runs the whole sequence as it stands, with the
    rows so far and a mask of what is there.
    """
    with opened(runner) as generator:
        batch = batch_of(generator, 1, cfg_scale=1, temperature=0.0)
        run(generator, batch, 10)
        found = generator.runner.tokens()[0]
        slots = [
            generator.runner.read_cache(CacheTensor(layer, 0, "position"))[0, 0]
            for layer in range(generator.config.num_layers)
        ]
    length = int(batch.lengths[0])
    held = np.arange(len(slots[0])) < length + 575
    for own in slots:
        np.testing.assert_array_equal(own, np.where(held, np.arange(len(own)), -1))
    tokens, margins = oracle(batch, 10)
    different = np.flatnonzero(found != tokens)
    assert not len(different) or margins[different[0]] < 1e-4


@torch.inference_mode()
def oracle(batch: PromptBatch, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens of one image without guidance, and the margin of each."""
    opened_bundle = open_bundle(bundle_of())
    config = opened_bundle.config.model
    model, _ = load_modules(opened_bundle, config, "cpu")
    length, total = int(batch.lengths[0]), config.grid.num_tokens
    keys: list[dict[int, torch.Tensor]] = [{} for _ in range(config.num_layers)]
    values: list[dict[int, torch.Tensor]] = [{} for _ in range(config.num_layers)]

    def attend(positions: list[int], is_prompt: bool) -> object:
        def step(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            for place, position in enumerate(positions):
                keys[layer][position], values[layer][position] = (
                    key[0, :, place],
                    value[0, :, place],
                )
            outs = []
            for place, position in enumerate(positions):
                seen = [held for held in sorted(keys[layer]) if held <= position]
                group = query.shape[1] // key.shape[1]
                k, v = (
                    torch.stack([held[at] for at in seen], 1).repeat_interleave(group, 0)
                    for held in (keys[layer], values[layer])
                )
                logits = (query[0, :, place, None] * k).sum(-1) * query.shape[-1] ** -0.5
                outs.append((logits.softmax(-1)[..., None] * v).sum(1))
            return torch.stack(outs, 1)[None]

        return step

    def best(hidden: torch.Tensor) -> tuple[int, float]:
        top = model.image_logits(hidden).float().topk(2).values
        return int(model.image_logits(hidden).argmax()), float(top[0] - top[1])

    lengths = torch.tensor([length])
    prompt = model.condition(torch.from_numpy(batch.embeds[:1, :length]))
    places = list(range(length))
    hidden = model(prompt, torch.tensor([places]), attend(places, True), lengths)
    tokens, margins = np.zeros(total, np.int32), np.zeros(total)
    tokens[0], margins[0] = best(hidden[0, -1])
    for step_places in passes_of(config.grid, start):
        sources = torch.tensor([[int(tokens[place.source]) for place in step_places]])
        places = [length + place.step - 1 for place in step_places]
        embeds = model.embed_image_tokens(sources)
        hidden = model(embeds, torch.tensor([places]), attend(places, False), lengths)
        for index, place in enumerate(step_places):
            if place.is_new:
                tokens[place.step], margins[place.step] = best(hidden[0, index])
    return tokens, margins


def test_both_runners_sample_the_same_and_a_batch_is_its_images() -> None:
    found = {}
    for runner in RUNNERS:
        with opened(runner) as generator:
            batch = batch_of(generator, 2)
            assert run(generator, batch, 4).passes == 23 * 4 + 23
            found[runner] = generator.runner.tokens()
            run(generator, batch_of(generator, 1), 4)
            np.testing.assert_array_equal(generator.runner.tokens()[0], found[runner][0])
    same = (found["ort"] == found["torch"]).all(axis=1)
    assert same.any()


def test_int8_caches_hold_the_rows_of_single_steps() -> None:
    """Teacher-forced: where a code is rounded the other way, later logits differ more than a tie
    in float allows.
    """
    path, some = bundle_of("full", kv_dtype="int8"), 60
    with opened("ort", path) as generator:
        runner, batch = generator.runner, batch_of(generator, 1)
        parts = (range(step, step + 1) for step in range(1, some))
        wanted = [runner.logits() for _ in decode(runner, batch, generator.table, parts)]
        tokens, keys = runner.tokens(), runner.read_cache(CacheTensor(1, 0, "key"))
        scales = runner.read_cache(CacheTensor(1, 0, "key_scale"))
        runner.prefill(batch)
        noise = np.zeros((1, 1, generator.config.codebook_size), np.float32)
        for step in range(1, some):
            runner.decode_rows(np.array([step]), tokens[:, step - 1 : step], noise, 1)
            np.testing.assert_allclose(runner.logits(), wanted[step], atol=5e-3)
        codes = runner.read_cache(CacheTensor(1, 0, "key")).astype(int) - keys
        assert np.abs(codes).max() <= 1 and (codes != 0).mean() < 1e-3
        found = runner.read_cache(CacheTensor(1, 0, "key_scale"))
        np.testing.assert_allclose(found, scales, rtol=1e-3, atol=1e-6)
    with opened("torch", path) as generator, pytest.raises(UserError, match="--runner ort"):
        run(generator, batch_of(generator, 1), 4)


def test_noise_is_that_of_each_step() -> None:
    with opened("ort") as generator:
        batch, grid = batch_of(generator, 2), generator.config.grid
        codes = generator.config.codebook_size
    noise, wanted = RowsNoise(batch, grid, codes), GumbelNoise(batch.images, codes)
    for places in list(passes_of(grid, 5))[:80]:
        steps = np.array([place.step for place in places])
        every = np.stack([wanted(range(step, step + 1))[0] for step in steps.tolist()], axis=1)
        np.testing.assert_array_equal(noise(steps), every)


@pytest.mark.parametrize("policy", ["linear", "h2o", "streaming-llm"])
def test_caches_that_evict_are_refused_at_once_with_the_way_out(policy: str) -> None:
    path = bundle_of(policy)
    assert not keeps_rows(read_config(path).policy)
    assert not any(name.startswith("decode_rows") for name in read_config(path).graphs)
    with opened("torch", path) as generator:
        with pytest.raises(UserError, match="needs caches that keep everything") as error:
            generator.stream(["a red circle"], lookahead="zipar:8")
        assert "--policy full" in str(error.value) and policy in str(error.value)


def test_what_is_no_start_is_refused() -> None:
    assert (rows_start("zipar:8"), rows_start("auto"), rows_start(8)) == (8, None, None)
    for text in ("zipar:", "zipar:0", "zipar:-1", "zipar:x", "zipar:1.5", "zipar:99999"):
        with pytest.raises(UserError, match="use zipar:12"):
            rows_start(text)
    with opened("torch") as generator, pytest.raises(UserError, match=r"outside 1 \.\. 24"):
        list(generator.stream(["a red circle"], lookahead="zipar:25"))
    assert TrtRunner.no_rows


def test_a_bundle_without_the_graph_says_how_to_get_it() -> None:
    out = scratch() / "old-full"
    from ssd_export.export.exporter import export_bundle

    path = export_bundle(export_spec(checkpoint(TinyJanus()), "full", out=out, force=True))
    with opened("ort", path) as generator:
        generator.runner.no_rows = "export it again"  # as of a bundle that lacks it
        with pytest.raises(UserError, match="export it again"):
            run(generator, batch_of(generator, 1), 4)


def test_generate_counts_passes() -> None:
    with opened("ort") as generator:
        result = generator(["a red circle"], lookahead="zipar:2", seed=1)
        assert generator.passes == 23 * 2 + 23
        assert not np.array_equal(result.tokens, generator(["a red circle"], seed=1).tokens)
