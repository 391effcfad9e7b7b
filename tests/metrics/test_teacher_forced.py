"""The replay equals drawing step by step; a cache that never evicts equals causal attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_export.bundle import open_bundle
from ssd_export.demo.codes import encode_scene
from ssd_export.metrics import teacher_forced
from ssd_export.metrics.scene_score import draw_scenes
from ssd_export.metrics.similarity import kl_to_full_cache, psnr, ssim, token_agreement
from ssd_export.metrics.teacher_forced import SceneLosses, Sequences, TeacherForced
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.noise import GumbelNoise, ImageSeed
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import sampling_inputs
from ssd_export.runtime.torch_runner import draw_tokens
from ssd_export.sampling import Sampling


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TeacherForced:
    return TeacherForced(open_checkpoint(checkpoint))


def table_of(bundle: Path) -> PolicyTable:
    return open_bundle(bundle).config.policy


@pytest.fixture(scope="module")
def sequences(model: TeacherForced) -> Sequences:
    scenes = draw_scenes(4, 0)
    return model.sequences(
        [scene.caption for scene in scenes], np.stack([encode_scene(scene) for scene in scenes]), 64
    )


@pytest.mark.parametrize("policy, budget", [("ssd-row", 0.1), ("linear", 0.2)])
def test_the_replay_draws_what_the_exported_graphs_draw(
    model: TeacherForced, exported: Callable[..., Path], policy: str, budget: float
) -> None:
    """Tokens drawn by ONNX Runtime from its cache are the ones that the replayed logits give with
    the same numbers.
    """
    path, captions = exported(policy, budget), ["a red circle on white", "two blue bars on sand"]
    sampling = Sampling(2.0, 1.0)
    with ImageGenerator.from_bundle(path) as generator:
        tokens = generator(captions, seed=5, cfg_scale=2.0, temperature=1.0).tokens
    sequences = model.sequences(captions, tokens, 64, unconditional=True)
    logits = model.model.image_logits(model.hidden(sequences, table_of(path)))  # [4, 576, V]
    images = [ImageSeed(5, 0), ImageSeed(5, 1)]
    noise = torch.from_numpy(GumbelNoise(images, model.config.codebook_size)(range(576)))
    inputs = {
        name: torch.from_numpy(values) for name, values in sampling_inputs([sampling] * 2).items()
    }
    drawn = torch.stack(
        [draw_tokens(logits[:, step], noise[step], **inputs) for step in range(576)], dim=1
    )
    assert (
        drawn.numpy() == tokens
    ).mean() > 0.995  # all, but for a random number on the border of two tokens


def test_a_cache_that_is_never_full_equals_causal_attention(
    model: TeacherForced, sequences: Sequences, exported: Callable[..., Path]
) -> None:
    dense = model.hidden(sequences, None)
    torch.testing.assert_close(
        model.hidden(sequences, table_of(exported("full", 1.0))), dense, rtol=1e-4, atol=1e-4
    )


def test_a_batch_is_split_by_prompt_length(
    model: TeacherForced, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [scene for scene in draw_scenes(4, 3) for _ in range(3)]
    tokens = np.stack([encode_scene(scene) for scene in scenes])
    sequences = model.sequences([scene.caption for scene in scenes], tokens, 64)
    monkeypatch.setattr(teacher_forced, "ROWS", 2)
    parts = list(sequences.parts())
    assert sorted(row for _, rows in parts for row in rows.tolist()) == list(range(12))
    assert len({length for length, _ in parts}) > 1 and max(len(rows) for _, rows in parts) == 2
    assert all((sequences.lengths[rows] == length).all() for length, rows in parts)


def test_losses_are_those_of_the_logits_and_rows_do_not_mix(
    model: TeacherForced, exported: Callable[..., Path]
) -> None:
    scenes = draw_scenes(9, 7)  # more rows than one part of logits
    table, full = table_of(exported("ssd-row", 0.1)), table_of(exported("full", 1.0))
    losses, kl = SceneLosses(model, scenes).of(table)
    assert (
        losses.shape == kl.shape == (9,)
        and losses.dtype == kl.dtype == np.float64
        and (kl > 1e-6).all()
    )
    one = SceneLosses(model, scenes[4:5])
    np.testing.assert_allclose(np.stack(one.of(table)), [losses[4:5], kl[4:5]], rtol=1e-4)
    loss, nothing = one.of(full)
    assert abs(nothing[0]) < 1e-8 and not np.allclose(loss, losses[4], atol=1e-3)
    tokens = encode_scene(scenes[4])
    logits = model.model.image_logits(
        model.hidden(model.sequences([scenes[4].caption], tokens[None], 64), full)
    )[0]
    assert loss[0] == pytest.approx(
        -logits.log_softmax(dim=-1)[range(576), tokens].mean().item(), rel=1e-4
    )


def test_kl_is_zero_for_the_full_cache_and_positive_otherwise(
    model: TeacherForced, exported: Callable[..., Path]
) -> None:
    captions = ["a red circle on white"]
    sequences = model.sequences(captions, np.zeros((1, 576), np.int64), 64, unconditional=True)
    assert abs(kl_to_full_cache(model, sequences, table_of(exported("full", 1.0)), 2.0)[0]) < 1e-9
    assert kl_to_full_cache(model, sequences, table_of(exported("h2o", 0.1)), 2.0)[0] > 1e-4


def test_measures_of_likeness() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 48, 3), np.uint8)
    assert psnr(image, image) == 100 and ssim(image, image) == pytest.approx(1)
    one_off = np.where(image < 255, image + 1, image - 1).astype(np.uint8)
    assert (
        psnr(image, one_off) == pytest.approx(48.13, abs=0.01) and 0.999 < ssim(image, one_off) < 1
    )
    assert abs(ssim(image, rng.integers(0, 256, image.shape, np.uint8))) < 0.05
    assert token_agreement(np.array([[1, 2, 3, 4]]), np.array([[1, 2, 0, 4]])).tolist() == [0.75]
