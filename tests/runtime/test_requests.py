"""Images of one batch that were asked for apart: each with its own seed, guidance, temperature and
top-k."""

from __future__ import annotations

import numpy as np
import pytest

from ssd_export.noise import ImageSeed
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, head_map_file

NUM_TOKENS = 60
REQUESTS = [
    (PROMPTS[0], Sampling(3.0, 1.0), ImageSeed(5, 0)),
    (PROMPTS[1], Sampling(1.0, 0.7, 4), ImageSeed(2**63, 1)),
    (PROMPTS[0], Sampling(2.0, 0.0), ImageSeed(5, 1)),
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
        together = tokens_of(generator, make.of_requests(*zip(*REQUESTS, strict=True)))
        for place, request in enumerate(REQUESTS):
            alone = tokens_of(generator, make.of_requests(*([part] for part in request)))
            np.testing.assert_array_equal(alone[0], together[place])


def test_a_batch_knows_whether_it_needs_noise_or_top_k() -> None:
    def batch(*sampling: Sampling) -> PromptBatch:
        nothing = np.zeros(0)
        images = tuple(ImageSeed(0, place) for place in range(len(sampling)))
        return PromptBatch(nothing, nothing, images, sampling)

    assert batch(Sampling(1, 0), Sampling(2, 0)).is_greedy
    assert not batch(Sampling(1, 0), Sampling(2, 0.1)).is_greedy
    assert batch(Sampling(), Sampling(top_k=3)).uses_top_k
    assert not batch(Sampling(), Sampling(1, 2)).uses_top_k
