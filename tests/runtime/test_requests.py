"""Images of one batch that were asked for apart: each with its own seed, guidance, temperature and
top-k."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ssd_export.errors import UserError
from ssd_export.noise import ImageSeed
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.prompt_batch import ImageRequest, PromptBatch, PromptBatches
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, head_map_file
from tests.runtime.near_ties import assert_same_tokens

NUM_TOKENS = 60
REQUESTS = [
    ImageRequest(PROMPTS[0], Sampling(3.0, 1.0), ImageSeed(5, 0)),
    ImageRequest(PROMPTS[1], Sampling(1.0, 0.7, 4), ImageSeed(2**63, 1)),
    ImageRequest(PROMPTS[0], Sampling(2.0, 0.0), ImageSeed(5, 1)),
    ImageRequest(PROMPTS[0], Sampling(3.0, 1.0), ImageSeed(5, 0), PROMPTS[1]),
]


def tokens_of(generator: ImageGenerator, batch: PromptBatch) -> np.ndarray:
    for _ in decode(generator.runner, batch, generator.table, single_steps(NUM_TOKENS)):
        pass
    return generator.runner.tokens()[:, :NUM_TOKENS]


@pytest.mark.parametrize("runner", ["ort", "torch"])
def test_an_image_is_the_same_alone_and_among_others(runner: str) -> None:
    model = checkpoint(TinyJanus(seed=3, num_kv_heads=2))
    path = bundle(model, "ssd-row", 0.2, head_map=str(head_map_file(model)))
    with ImageGenerator.from_bundle(path, runner=runner, num_threads=1) as generator:
        make = PromptBatches.from_bundle(generator.bundle)
        together = tokens_of(generator, make.of_requests(REQUESTS))
        for place, request in enumerate(REQUESTS):
            alone = tokens_of(generator, make.of_requests([request]))
            np.testing.assert_array_equal(alone[0], together[place])


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["ort", "torch"])
def test_requests_of_a_batch_with_lookahead_have_the_tokens_of_single_steps(runner: str) -> None:
    path = bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2, lookahead=8)
    with ImageGenerator.from_bundle(path, runner=runner, num_threads=1) as generator:
        batch = PromptBatches.from_bundle(generator.bundle).of_requests(REQUESTS)
        *_, plain = generator.stream_requests(REQUESTS)
        rows = list(generator.stream_requests(REQUESTS, lookahead=8))
        assert [row.row for row in rows] == list(range(24)) and generator.passes < 575
        assert len(rows[-1].images) == len(REQUESTS)
        parted = assert_same_tokens((rows[-1].tokens, generator), (plain.tokens, generator), batch)
        assert len(parted) < len(REQUESTS), "every image met a near tie: use another seed"


def test_lookahead_that_cannot_be_is_refused_at_once() -> None:
    path = bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2, lookahead=8)
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        for lookahead in (0, -1, 65, "8", 2.5):
            with pytest.raises(UserError, match="lookahead"):
                generator.stream(["a"], lookahead=lookahead)
            with pytest.raises(UserError, match="lookahead"):
                next(generator.stream_requests(REQUESTS, lookahead=lookahead))
        generator.runner.no_window = "one token a pass; use another runner"
        for mode, is_refused in (("auto", False), (1, False), (2, True)):
            if is_refused:
                with pytest.raises(UserError, match="one token a pass"):
                    generator.check_lookahead(mode)
            else:
                assert generator.check_lookahead(mode) == mode


def by_hand(make: PromptBatches, request: ImageRequest) -> PromptBatch:
    """The rows of an image put together from those of its two prompts."""
    rows = []
    for prompt in (request.prompt, request.negative_prompt):
        encoded = make.encoder.encode([prompt], make.prompt_slots)
        rows.append(encoded.ids[0, : encoded.prompt_length[0]])
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((2, lengths.max()), np.int32)
    for padded, row in zip(ids, rows):
        padded[: len(row)] = row
    return PromptBatch(make.embed(ids), lengths, (request.image,), (request.sampling,))


@pytest.mark.parametrize("runner", ["ort", "torch"])
@pytest.mark.parametrize("policy", ["full", "ssd-row"])
def test_a_negative_prompt_is_the_unconditional_row(runner: str, policy: str) -> None:
    model = checkpoint(TinyJanus(seed=3, num_kv_heads=2))
    path = bundle(model, policy, 0.2, head_map=str(head_map_file(model)))
    images = [
        ImageRequest(PROMPTS[0], Sampling(3.0, 1.0), ImageSeed(5, number), negative)
        for number, negative in enumerate(["", PROMPTS[1], PROMPTS[2], "  "])
    ]
    with ImageGenerator.from_bundle(path, runner="torch", num_threads=1) as reference:
        make = PromptBatches.from_bundle(reference.bundle)
        expected = [
            tokens_of(
                reference,
                by_hand(make, request)
                if request.negative_prompt.strip()
                else make([request.prompt], request.sampling, 5, request.image.image),
            )[0]
            for request in images
        ]
    with ImageGenerator.from_bundle(path, runner=runner, num_threads=1) as generator:
        together = tokens_of(generator, make.of_requests(images))
    np.testing.assert_array_equal(together, expected)
    plain = make.of_requests([replace(request, negative_prompt="") for request in images])
    assert plain.lengths.tolist() != make.of_requests(images).lengths.tolist()


def test_stream_takes_a_negative_prompt_for_all_or_for_each() -> None:
    path = bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        first, second = (
            generator(PROMPTS[:1], negative_prompt=negative, max_batch=1).tokens[0]
            for negative in ("", "blue")
        )
        assert (first != second).any()
        each = generator([PROMPTS[0]] * 2, negative_prompt=["", "blue"], seeds=[0, 0]).tokens
        np.testing.assert_array_equal(each, [first, second])
        for wrong, fix in (
            ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
            ({"negative_prompt": [3]}, "a negative prompt is a int"),
            ({"negative_prompt": "a", "cfg_scale": 1}, "does nothing at cfg_scale 1"),
            ({"negative_prompt": "a " * 99}, "the negative prompt 'a a .* tokens long, 32 fit"),
        ):
            with pytest.raises(UserError, match=fix):
                generator.stream(PROMPTS[:1], **wrong)


def test_a_batch_knows_whether_it_needs_noise_or_top_k() -> None:
    def batch(*sampling: Sampling) -> PromptBatch:
        nothing = np.zeros(0)
        images = tuple(ImageSeed(0, place) for place in range(len(sampling)))
        return PromptBatch(nothing, nothing, images, sampling)

    assert batch(Sampling(1, 0), Sampling(2, 0)).is_greedy
    assert not batch(Sampling(1, 0), Sampling(2, 0.1)).is_greedy
    assert batch(Sampling(), Sampling(top_k=3)).uses_top_k
    assert not batch(Sampling(), Sampling(1, 2)).uses_top_k
