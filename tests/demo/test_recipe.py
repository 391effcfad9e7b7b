"""The recipe in its quick form: it learns, resumes, and its checkpoint generates the same in
transformers and here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration

from ssd_export.demo import codes
from ssd_export.demo.batches import Mix, PromptIds, choose_places, draw_batch
from ssd_export.demo.recipe import train_demo
from ssd_export.demo.scenes import KINDS, RADII, Scene, Shape, random_scene
from ssd_export.demo.tokenizer import train_tokenizer
from ssd_export.demo.train import (
    Recipe,
    SpatialHeads,
    Trainee,
    Training,
    causal_attention,
    demo_config,
    join_rows,
)
from ssd_export.demo.train_decoder import DecoderRecipe
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import janus
from ssd_export.runtime.generate import ImageGenerator
from tests.janus_checkpoints import oracle_tokens
from tests.runtime.checkpoints import bundle

pytestmark = pytest.mark.slow

# Half a minute on one core. A model that knows nothing loses ln 1664 = 7.4 nats per token.
QUICK = Recipe(num_steps=60, sparse_share=1.0, sparse=((6, 144),), warmup_steps=10, decay_share=0.5)
QUICK_DECODER = DecoderRecipe(num_steps=30, batch_size=4, warmup_steps=5)
TOKEN_LOSS_BOUND = 1.5
DECODER_LEVELS_BOUND = 45.0
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("demo-training")
    return folder, train_demo(QUICK, QUICK_DECODER, folder, lambda stage, done, total: None)


def test_quick_recipe_learns(trained: tuple[Path, object]) -> None:
    _, outcome = trained
    assert outcome.token_loss < TOKEN_LOSS_BOUND, outcome
    assert outcome.decoder_levels < DECODER_LEVELS_BOUND, outcome


def test_checkpoint_loads_in_transformers_and_generates_the_same(
    trained: tuple[Path, object],
) -> None:
    checkpoint = trained[0] / "checkpoint"
    model = JanusForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompts = ("a red circle on white",)
    wanted, gap = oracle_tokens(model, train_tokenizer(), prompts, 2.0)
    generated = ImageGenerator.from_bundle(bundle(checkpoint, "full", 1.0))(
        prompts, cfg_scale=2.0, temperature=0
    ).tokens
    if gap <= ROUNDING:
        pytest.skip(
            f"needs a training without a tie: on this processor it came to two tokens {gap} apart"
        )
    np.testing.assert_array_equal(generated, wanted)


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    recipe = Recipe(
        num_steps=4,
        sparse_share=1.0,
        sparse=((2, 144),),
        hidden_size=32,
        num_heads=1,
        intermediate_size=32,
    )
    whole = Training(recipe, tmp_path / "whole")
    figures = [step["token"] for step in whole.run()]
    first = Training(recipe, tmp_path / "parts")
    steps = first.run()
    for _ in range(2):
        next(steps)
    first.save()
    resumed = [step["token"] for step in Training(recipe, tmp_path / "parts").run()]
    assert resumed == pytest.approx(figures[2:], rel=1e-5)


def test_folded_tables_compute_what_the_factored_ones_do() -> None:
    torch.manual_seed(0)
    recipe = Recipe(num_steps=1, hidden_size=32, num_heads=1, intermediate_size=32)
    tokenizer = train_tokenizer()
    trainee = Trainee(demo_config(recipe, tokenizer.get_vocab_size()))
    batch = draw_batch(
        np.random.default_rng(0), PromptIds(tokenizer), Mix(1, 575, (1, 0, 0, 0), 0.0)
    )
    plain = ImageTokenModel(demo_config(recipe, tokenizer.get_vocab_size()), text_embedding=True)
    plain.load_state_dict(trainee.folded_state())
    hidden = torch.cat(
        [plain.embed_text_tokens(batch.ids), plain.embed_image_tokens(batch.inputs)], dim=1
    )
    positions = torch.arange(hidden.shape[1])[None]
    logits = plain.image_logits(
        plain(hidden, positions, causal_attention)[:, batch.ids.shape[1] - 1 :]
    )
    torch.testing.assert_close(logits, trainee(batch), rtol=1e-4, atol=1e-5)


def test_a_sequence_with_gaps_stands_for_the_whole_image() -> None:
    prompt_ids, shares = PromptIds(train_tokenizer()), (0.25, 0.25, 0.25, 0.25)
    whole = draw_batch(np.random.default_rng(3), prompt_ids, Mix(8, 575, shares, 0.0))
    sparse = draw_batch(np.random.default_rng(3), prompt_ids, Mix(8, 192, shares, 0.0))
    assert (whole.weights == 1).all() and (whole.places == torch.arange(575)).all()
    torch.testing.assert_close(sparse.weights.sum(1), torch.full((8,), 576.0))
    torch.testing.assert_close(sparse.inputs, whole.inputs.gather(1, sparse.places))
    torch.testing.assert_close(sparse.targets[:, 1:], whole.targets[:, 1:].gather(1, sparse.places))
    shapes = [(batch.targets >= codes.NUM_GROUND_CODES).sum(1) for batch in (whole, sparse)]
    torch.testing.assert_close(*shapes, msg="a patch of a shape is missing")
    assert sparse.telling.sum() == whole.telling.sum()


def test_too_many_shapes_for_the_sequence_are_left_out_by_chance() -> None:
    rng = np.random.default_rng(4)
    tokens = np.full((200, 576), codes.NUM_GROUND_CODES)
    places, weights = choose_places(rng, tokens, 144)
    np.testing.assert_allclose(weights[:, 1:], 575 / 144, rtol=1e-6)
    assert np.bincount(places.flatten(), minlength=575).min() > 20, (
        "some place is hardly ever chosen"
    )


def test_only_the_caption_tells_where_a_ring_parts_from_a_circle() -> None:
    for kind, telling in (("circle", [0, 7]), ("ring", [0, 7]), ("square", [0]), ("bar", [6])):
        scene = Scene("white", (Shape(kind, "red", 48, 48, 12),), "single", "")
        corner = 9 * codes.GRID + 9
        places = [corner + place // 6 * codes.GRID + place % 6 for place in telling]
        assert np.flatnonzero(codes.caption_tokens(scene)).tolist() == [0, *places], kind


def test_gaps_keep_the_true_positions() -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    trainee = Trainee(
        demo_config(
            Recipe(1, hidden_size=32, num_heads=1, intermediate_size=32), tokenizer.get_vocab_size()
        )
    )
    batch = draw_batch(
        np.random.default_rng(3), PromptIds(tokenizer), Mix(2, 192, (1, 0, 0, 0), 0.0)
    )
    prompt = trainee.model.embed_text_tokens(batch.ids)
    image = trainee.model.generation_aligner(trainee.input_table()[batch.inputs])
    _, positions = join_rows(prompt, image, batch.lengths, batch.places)
    for row, length, places in zip(positions, batch.lengths.tolist(), batch.places, strict=True):
        torch.testing.assert_close(row[:length], torch.arange(length))
        torch.testing.assert_close(row[length : length + 192], length + places)


@pytest.mark.parametrize("num_places", [575, 100])
def test_spatial_heads_are_measured_as_calibrate_does(num_places: int) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    trainee = Trainee(
        demo_config(
            Recipe(1, num_layers=2, hidden_size=32, num_heads=2, intermediate_size=32),
            tokenizer.get_vocab_size(),
        )
    )
    batch = draw_batch(
        np.random.default_rng(3), PromptIds(tokenizer), Mix(3, num_places, (0, 0.5, 0.5, 0), 0.0)
    )
    heads, seen = SpatialHeads(batch, np.random.default_rng(4)), []

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        seen.append((query, key))
        return heads(layer, query, key, value)

    trainee(batch, attend)
    assert len(batch.lengths.unique()) > 1, "rows of one length test nothing"
    for metrics, (query, key) in zip(heads.metrics, seen, strict=True):
        for head in range(2):
            outside = on_image = 0.0
            for row, length in enumerate(batch.lengths.tolist()):
                for asking in heads.asking[row].tolist():
                    logits = (
                        query[row, head, asking] @ key[row, head, : asking + 1].T / 4.0
                    )  # sqrt of 16 wide heads
                    mass = logits.softmax(0)[length:]
                    places = batch.places[row, : len(mass)]
                    on_image += mass.sum().item()
                    outside += mass[places <= places[-1] - janus.GRID.neighborhood].sum().item()
            assert metrics[head].item() == pytest.approx(outside / on_image, rel=1e-4)
    both = torch.cat(heads.metrics)
    assert heads.penalty(0.5).item() == pytest.approx(both.sort().values[:2].mean().item())


def test_every_patch_of_every_shape_has_one_code() -> None:
    assert len(codes.patterns()) == 196 and codes.num_codes() == 104 + 195 * 8
    pattern, paint = codes.factors()
    assert len({*zip(pattern.tolist(), paint.tolist())}) == codes.num_codes(), (
        "two codes for one look and place"
    )
    rng = np.random.default_rng(1)
    for _ in range(50):
        tokens = codes.encode_scene(random_scene(rng)).reshape(codes.GRID, codes.GRID)
        np.testing.assert_array_equal(tokens[:, 0] // 4, 1 + np.arange(codes.GRID))
        assert (tokens[:, -1] // 4 == codes.LAST_COLUMN).all()
        inside = tokens[:, 1:-1]
        assert ((inside < 4) | (inside >= codes.NUM_GROUND_CODES)).all() and (
            tokens < codes.num_codes()
        ).all()
    assert len(KINDS) * len(RADII) == 24
