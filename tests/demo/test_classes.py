"""The class-conditional demo model: its classes are captions, and its checkpoint computes what was
trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_export.demo.batches import Mix, draw_batch
from ssd_export.demo.captions import parse_caption
from ssd_export.demo.classes import (
    ClassIds,
    class_factors,
    class_names,
    write_class_checkpoint,
)
from ssd_export.demo.scenes import CLASS_CATEGORIES, random_scene
from ssd_export.demo.train import Recipe, Training, class_recipe, join_rows
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.families import prompt_encoder
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.model.load import load_image_decoder, load_model

QUICK = Recipe(
    num_steps=4, has_classes=True, num_layers=2, sparse=((4, 72),),
    sparse_share=1.0, warmup_steps=1, spatial_weight=0.0,
)  # fmt: skip
ROUNDING = 2e-2  # of logits, by weights in fp16


def test_every_class_is_a_caption_and_every_such_caption_a_class() -> None:
    names = class_names()
    assert len(set(names)) == len(names) == 4 * 8 * 6 * 4
    for name in names[::7]:
        assert 1 <= parse_caption(name).count <= 4
    rng, ids = np.random.default_rng(0), ClassIds()
    for category in CLASS_CATEGORIES * 20:
        caption = random_scene(rng, category).caption
        assert names[ids(caption, False)[0]] == caption
        assert ids(caption, True) == [len(names)]


def test_classes_share_factors_and_no_class_shares_none() -> None:
    factors = np.stack(class_factors())
    assert len(set(map(tuple, factors.T.tolist()))) == factors.shape[1] == len(class_names()) + 1
    assert not (factors[:, :-1] == factors[:, -1:]).any()


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(QUICK, tmp_path_factory.mktemp("classes"))
    for _ in training.run():
        pass
    return training


def test_the_checkpoint_computes_what_was_trained(training: Training, tmp_path: Path) -> None:
    training.trainee.load_state_dict(training.average)
    decoder = load_image_decoder(open_checkpoint(DEMO_CHECKPOINT)).state_dict()
    write_class_checkpoint(
        tmp_path, training.config, training.trainee.folded_state(), decoder, {"cfg_scale": 1.0}
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == training.config
    batch = draw_batch(np.random.default_rng(5), ClassIds(), Mix(2, 72, (0.5, 0.5, 0, 0), 0.0))
    model = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = training.trainee(batch)
        prompt, image = model.embed_text_tokens(batch.ids), model.embed_image_tokens(batch.inputs)
        hidden, positions = join_rows(prompt, image, batch.lengths, batch.places)
        hidden = model(
            hidden,
            positions,
            lambda layer, q, k, v: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True
            ),
            batch.lengths,
        )
        assert (model.image_logits(hidden) - expected).abs().max() < ROUNDING
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    assert encoder.encode([class_names()[5]], 1).ids.tolist() == [[5], [len(class_names())]]
    with pytest.raises(UserError, match="no class of this model"):
        encoder.encode(["a red circle above a blue bar on white"], 1)


def test_training_resumes_to_the_same_weights(training: Training, tmp_path: Path) -> None:
    first = Training(QUICK, tmp_path)
    for _, _ in zip(range(2), first.run(), strict=False):
        pass
    first.save()
    resumed = Training(QUICK, tmp_path)
    assert resumed.step == first.step > 0
    for _ in resumed.run():
        pass
    for name, value in training.average.items():
        torch.testing.assert_close(resumed.average[name], value, msg=name)


def test_the_recipe_asks_no_head_to_look_near() -> None:
    assert class_recipe().spatial_weight == 0 and class_recipe().has_classes


def test_sequences_of_every_length_take_turns_and_whole_images_end_the_training(
    tmp_path: Path,
) -> None:
    training = Training(replace(QUICK, sparse=((4, 72), (2, 575)), sparse_share=0.5), tmp_path)
    mixes = []
    for training.step in range(QUICK.num_steps):
        mixes.append((training.mix().size, training.mix().num_places))
    assert mixes == [(4, 72), (2, 575), (QUICK.batch_size, 575), (QUICK.batch_size, 575)]
