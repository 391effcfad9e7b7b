"""Each graph is tuned for the sizes that it runs at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_export.tensorrt.profiles import Profile, profile_for, profiles_of
from ssd_export.tensorrt.target import Batch

PROMPT = 64
BATCHES = st.lists(st.integers(1, 200), min_size=3, max_size=3).map(sorted).map(lambda n: Batch(*n))


def images(graph: str, batch: Batch, decoder_images: int = 4) -> list[tuple[int, int, int]]:
    return [profile.images for profile in profiles_of(graph, batch, PROMPT, decoder_images)]


def test_a_decode_step_is_tuned_apart_for_one_a_few_and_many() -> None:
    assert images("decode_step", Batch(1, 1, 1)) == [(1, 1, 1)]
    assert images("decode_step", Batch(1, 1, 8)) == [(1, 1, 1), (2, 8, 8)]
    assert images("decode_step_top_k", Batch(1, 32, 128)) == [(1, 1, 1), (2, 16, 16), (17, 32, 128)]
    assert images("decode_step", Batch(3, 4, 8)) == [(3, 4, 8)]


@given(BATCHES)
def test_every_batch_has_one_profile(batch: Batch) -> None:
    for graph in ("prefill", "decode_step", "evict"):
        profiles = profiles_of(graph, batch, PROMPT, decoder_images=4)
        for count in range(batch.min, batch.max + 1):
            holds = [p for p in profiles if p.images[0] <= count <= p.images[2]]
            assert len(holds) == 1 and profiles[profile_for(profiles, count)] is holds[0]
        assert profile_for(profiles, batch.max + 1) is None
        assert all(least <= usual <= most for least, usual, most in (p.images for p in profiles))


def test_the_image_decoder_takes_fixed_numbers() -> None:
    """A range up to the batch asks for the intermediate results of all of it at once."""
    assert images("image_decoder", Batch(1, 1, 128), 8) == [(1, 1, 1), (8, 8, 8)]
    assert images("image_decoder", Batch(1, 1, 2), 8) == [(1, 1, 1), (2, 2, 2)]
    assert images("image_decoder", Batch(1, 4, 8), 1) == [(1, 1, 1)]


def test_the_prompt_has_the_length_that_it_is_padded_to() -> None:
    (profile,) = profiles_of("prefill", Batch(1, 2, 8), PROMPT, 4)
    assert profile == Profile((1, 2, 8), (PROMPT, PROMPT, PROMPT))


def test_rows_follow_the_images() -> None:
    profile = Profile((1, 4, 8), (64, 64, 64))
    assert profile.sizes("rows", 1) == (1, 4, 8) and profile.sizes("rows", 2) == (2, 8, 16)
    assert profile.sizes("images", 2) == (1, 4, 8)
    assert profile.sizes("prompt_tokens", 2) == (64, 64, 64) and profile.sizes(7, 2) == (7, 7, 7)
    with pytest.raises(KeyError):
        profile.sizes("columns", 2)
