"""The caption language: what is read, what is refused; the captions of the generator are read as
drawn.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ssd_export.demo.captions import Expectation, parse_caption
from ssd_export.demo.language import outside
from ssd_export.demo.scenes import CATEGORIES, random_scene
from ssd_export.errors import UserError

READ = {
    "a red circle on white": ("white", [("red", "circle")], None),
    "an orange bar on gray": ("gray", [("orange", "bar")], None),
    " a black ring on sand\n": ("sand", [("black", "ring")], None),
    "two black crosses on white": ("white", [("black", "cross")] * 2, None),
    "three green squares on gray": ("gray", [("green", "square")] * 3, None),
    "four orange triangles on pink": ("pink", [("orange", "triangle")] * 4, None),
    "a red circle and an orange square on pink": (
        "pink",
        [("red", "circle"), ("orange", "square")],
        None,
    ),
    "a red circle left of a blue bar on sand": (
        "sand",
        [("red", "circle"), ("blue", "bar")],
        "left of",
    ),
    "a cyan bar right of a cyan ring on white": (
        "white",
        [("cyan", "bar"), ("cyan", "ring")],
        "right of",
    ),
    "a purple cross above a yellow bar on gray": (
        "gray",
        [("purple", "cross"), ("yellow", "bar")],
        "above",
    ),
    "an orange cross below a red cross on gray": (
        "gray",
        [("orange", "cross"), ("red", "cross")],
        "below",
    ),
}

REFUSED = [
    "",
    "red circle on white",
    "an red circle on white",
    "a orange circle on white",
    "a red circle",
    "a red circle on green",
    "a brown circle on white",
    "a red star on white",
    "A red circle on white",
    "a red circle on white.",
    "a red  circle on white",
    "two red circle on white",
    "one red circle on white",
    "five red circles on white",
    "two crosss on white",
    "a red circle near a blue square on white",
    "a red circle left a blue square on white",
    "two red circles and a blue square on white",
    "a red circle and a blue square and a green bar on white",
]


@pytest.mark.parametrize("caption", READ)
def test_a_caption_is_read(caption: str) -> None:
    ground, objects, relation = READ[caption]
    assert parse_caption(caption) == Expectation(ground, tuple(objects), relation)
    assert parse_caption(caption).count == len(objects)


@pytest.mark.parametrize("caption", REFUSED)
def test_a_caption_outside_the_language_is_refused_with_the_language(caption: str) -> None:
    with pytest.raises(
        UserError, match="cannot read .*a red circle on white.*colors: red, green"
    ) as caught:
        parse_caption(caption)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_generated_caption_is_read_as_meant(category: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = random_scene(rng, category)
        wanted = parse_caption(scene.caption)
        assert wanted.ground == scene.ground
        assert Counter(wanted.objects) == Counter(
            (shape.color, shape.kind) for shape in scene.shapes
        )
        assert (wanted.relation is not None) == (category == "relation")


def test_a_long_caption_is_quoted_in_part() -> None:
    (line,) = outside(["x" * 3000])
    assert "has never seen 'xxx" in line and len(line) < 600
