"""Types of heads from an image's first tokens, against attention read one query at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssd_export.calibrate.attention_maps import head_attention
from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.calibrate.online import (
    NUM_TOKENS,
    Agreement,
    AgreementOfImages,
    same_type,
    type_online,
    with_agreement,
)
from ssd_export.calibrate.sequences import FullCacheImages, ImagesSpec
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.families import janus, prompt_encoder
from ssd_export.model.load import load_model
from ssd_export.policy.head_map import HeadMap
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

SPEC = ImagesSpec(
    ("a red circle", "two green triangles"), 3, Neighborhood(1, 48), 5, Sampling(1.0, 1.0), 16
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("online")
    tiny = TinyJanus(num_layers=2, num_heads=4, num_kv_heads=2, codebook_size=64)
    write_transformers_checkpoint(folder, tiny)
    return open_checkpoint(folder)


def typed(checkpoint: Checkpoint, spec: ImagesSpec = SPEC) -> list[HeadMap]:
    model = load_model(checkpoint)
    return type_online(checkpoint, model, spec, threshold=0.1, tool_version="test")


def test_the_metric_is_the_attention_outside_the_window_of_the_first_tokens(
    checkpoint: Checkpoint,
) -> None:
    model = load_model(checkpoint)
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    images = FullCacheImages(model, encoder, SPEC.prompt_slots)
    batch = images.batches(SPEC.prompts[:1], SPEC.sampling, SPEC.seed)
    tokens, prompt = images(batch)[0], batch.embeds[0, : batch.lengths[0]]
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    queries = range(NUM_TOKENS - 1)  # the last token is generated and never read
    attention = head_attention(model, prompt, tokens, heads, queries).reshape(2, 4, 99, -1)
    far = sum(attention[:, :, q, : q - 47].astype(np.float64).sum(-1) for q in range(48, 99))
    metric = far / attention[:, :, 48:].astype(np.float64).sum((-1, -2))
    np.testing.assert_allclose(typed(checkpoint)[0].metric, metric, rtol=1e-5)


def test_an_image_is_typed_alike_alone_and_among_others(checkpoint: Checkpoint) -> None:
    maps = typed(checkpoint)
    assert len(maps) == 3 and maps[0].metric != maps[2].metric
    alone = typed(checkpoint, ImagesSpec(**(vars(SPEC) | {"num_images": 1})))[0]
    np.testing.assert_allclose(alone.metric, maps[0].metric, rtol=1e-5)


def test_a_neighborhood_of_all_the_tokens_is_refused(checkpoint: Checkpoint) -> None:
    spec = ImagesSpec(**(vars(SPEC) | {"neighborhood": Neighborhood(1, NUM_TOKENS)}))
    with pytest.raises(UserError, match="1d:100 holds all of the first 99 tokens"):
        typed(checkpoint, spec)


def head_map(*metric: float, threshold: float = 0.5) -> HeadMap:
    return HeadMap(janus.NAME, janus.GRID, 1, 4, 4, 64, metric=(metric,), threshold=threshold)


def test_agreement_counts_heads_of_one_type() -> None:
    many = head_map(0.9, 0.8, 0.1, 0.0)
    one = head_map(0.9, 0.4, 0.3, 0.1)
    assert same_type(one, many) == 0.75
    agreement = Agreement.of(one, many)
    assert (agreement.same_type, agreement.same_type_at_share) == (0.75, 1.0)
    assert agreement.rank_correlation == pytest.approx(1)
    assert Agreement.of(head_map(0.0, 0.1, 0.8, 0.9), many).rank_correlation == pytest.approx(-1)


def test_agreement_of_images_is_over_all_pairs() -> None:
    maps = [head_map(0.9, 0.1, 0, 0), head_map(0.9, 0.9, 0, 0), head_map(0.9, 0.1, 0.9, 0)]
    found = AgreementOfImages.of(maps)
    assert found is not None
    assert found.mean == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert (found.least, found.always_same) == (0.5, 0.5)
    assert AgreementOfImages.of(maps[:1]) is None
    kept = with_agreement(maps[0], SPEC, None, found).statistics
    assert kept["agreement_of_images"]["least"] == 0.5 and "agreement_with_offline" not in kept
