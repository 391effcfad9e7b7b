"""Captions, verdicts and sheets of the scene score; the checker path on rendered scenes, the
plumbing on a random model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_export.demo.scenes import CATEGORIES, is_held_out, render
from ssd_export.errors import UserError
from ssd_export.metrics.scene_score import (
    GenerateOptions,
    draw_scenes,
    judge_image,
    score_scenes,
    share_by_category,
)
from ssd_export.report.contact_sheet import WRONG, Entry, captioned_sheet, comparison_sheet, wrapped
from ssd_export.runtime.generate import ImageGenerator


def test_captions_are_unseen_even_over_categories_and_a_function_of_the_seed() -> None:
    scenes = draw_scenes(42, 3)
    assert all(is_held_out(scene.caption) for scene in scenes)
    counts = Counter(scene.category for scene in scenes)
    assert set(counts) == set(CATEGORIES) and max(counts.values()) - min(counts.values()) <= 1
    assert draw_scenes(10, 3) == scenes[:10] and draw_scenes(10, 4) != scenes[:10]
    assert not any(is_held_out(scene.caption) for scene in draw_scenes(20, 0, held_out=False))
    with pytest.raises(UserError, match="use 300"):
        draw_scenes(0, 0)


def test_true_images_score_one_and_swapped_ones_nearly_zero() -> None:
    scenes = draw_scenes(40, 0)
    images = [Image.fromarray(render(scene)) for scene in scenes]
    right = [judge_image(image, scene.caption) for image, scene in zip(images, scenes)]
    wrong = [
        judge_image(image, scene.caption) for image, scene in zip(images[4:] + images[:4], scenes)
    ]
    assert all(share.value > 0.95 for share in share_by_category(scenes, right).values())
    assert sum(verdict.ok for verdict in wrong) <= 2


def test_an_image_of_another_size_is_judged_too() -> None:
    scene = draw_scenes(1, 0)[0]
    big = Image.fromarray(render(scene)).resize((384, 384), Image.Resampling.NEAREST)
    assert judge_image(big, scene.caption).ok


@pytest.mark.slow
def test_a_random_model_scores_zero_and_batches_change_nothing(
    exported: Callable[..., Path],
) -> None:
    scenes = draw_scenes(5, 0)
    told: list[tuple[str, int, int]] = []
    with ImageGenerator.from_bundle(exported("h2o")) as generator:
        score = score_scenes(
            generator, scenes, GenerateOptions(seed=1, batch=2), lambda *args: told.append(args)
        )
        again = score_scenes(generator, scenes, GenerateOptions(seed=1, batch=5))
        greedy = score_scenes(generator, scenes[:1], GenerateOptions(temperature=0.0))
    assert score.overall.hits == 0 and len(score.images) == 5
    np.testing.assert_array_equal(score.tokens, again.tokens)
    assert told[0] == ("generating 5 images", 1, 72) and told[71] == ("generating 5 images", 72, 72)
    assert told[-1] == ("judging", 5, 5)
    facts = score.to_dict()
    assert (
        facts["overall"]["high"] > 0.4 and 0 < facts["ms_per_token"] < 1000 * facts["seconds"] / 575
    )
    assert [image["caption"] for image in facts["images"]] == [scene.caption for scene in scenes]
    assert greedy.tokens.shape == (1, 576)


def test_a_sheet_frames_what_is_wrong() -> None:
    images = [Image.new("RGB", (96, 96), (0, 0, 250))] * 3
    sheet = captioned_sheet(
        [
            Entry(images[0], "a red circle on white"),
            Entry(images[1], "two", "count: 1, not 2"),
            Entry(images[2], "c"),
        ]
    )
    red = (np.asarray(sheet) == WRONG).all(axis=-1)
    assert red[:, sheet.width // 3 :].any() and not red[:, : sheet.width // 3].any()
    assert (np.asarray(sheet)[200:220, 10:150] < 100).any()  # the caption stands under its image
    rows = [("full 1", [Entry(images[0], "a")] * 2), ("h2o 0.2", [Entry(images[1], "a", "no")] * 2)]
    assert comparison_sheet(["a", "b"], rows).height > 2 * 96


def test_text_is_wrapped_at_words() -> None:
    def fits(text: str) -> bool:
        return len(text) <= 10

    assert wrapped("one two three four", fits, 3) == ["one two", "three four"]
    assert wrapped("one two three four five six", fits, 2) == ["one two", "three ..."]
    assert wrapped("", fits, 2) == [] and wrapped("incomprehensible", fits, 1) == [
        "incomprehensible"
    ]
