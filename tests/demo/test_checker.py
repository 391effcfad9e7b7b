"""The checker accepts what a caption says and rejects each kind of wrongness, alone, clean or
degraded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ssd_export.demo.captions import Expectation, parse_caption
from ssd_export.demo.checker import Found, Verdict, check, find_objects, judge, label_components
from ssd_export.demo.scenes import (
    COLORS,
    GROUNDS,
    KINDS,
    NUMBERS,
    RADII,
    RELATION_LEAD,
    RELATIONS,
    Scene,
    Shape,
    plural,
    random_scene,
    render,
)

pytestmark = pytest.mark.slow

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scenes(count: int, seed: int, category: str | None = None) -> list[Scene]:
    """Composed as the demo model's and standing anywhere, in turn."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng, category, composed=index % 2 == 0) for index in range(count)]


@pytest.fixture(scope="module")
def true_scenes() -> list[tuple[Scene, np.ndarray]]:
    return [(scene, render(scene)) for scene in scenes(1000, seed=1)]


@pytest.fixture(scope="module")
def found_in_true_scenes(true_scenes: list[tuple[Scene, np.ndarray]]) -> list[Found]:
    return [find_objects(image) for _, image in true_scenes]


def rate(images: list[tuple[np.ndarray, str]]) -> tuple[float, list[tuple[str, tuple[str, ...]]]]:
    """The share that is accepted, and (caption, reasons) of the first few that are not."""
    return share_accepted([(caption, check(image, caption)) for image, caption in images])


def share_accepted(
    verdicts: list[tuple[str, Verdict]],
) -> tuple[float, list[tuple[str, tuple[str, ...]]]]:
    refused = [(caption, verdict.reasons) for caption, verdict in verdicts if not verdict.ok]
    return 1 - len(refused) / len(verdicts), refused[:5]


def say(wanted: Expectation) -> str:
    """The caption of an expectation."""

    def noun(look: tuple[str, str]) -> str:
        return f"{'an' if look[0] == 'orange' else 'a'} {' '.join(look)}"

    objects = wanted.objects
    if wanted.relation is None and len(objects) > 1 and len(set(objects)) == 1:
        return f"{NUMBERS[len(objects)]} {objects[0][0]} {plural(objects[0][1])} on {wanted.ground}"
    return f" {wanted.relation or 'and'} ".join(map(noun, objects)) + f" on {wanted.ground}"


def other(rng: np.random.Generator, names: object, *not_these: object) -> str:
    return str(rng.choice([name for name in names if name not in not_these]))


def wrong_captions(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Captions that are each wrong in one way, by the kind of reason that the checker must give."""
    wanted = parse_caption(scene.caption)
    objects, ground = wanted.objects, wanted.ground
    alike = len(set(objects)) == 1
    color, kind = objects[0]
    rest = (lambda look: (look,) * len(objects)) if alike else (lambda look: (look, *objects[1:]))
    wrong = {
        "ground": replace(wanted, ground=other(rng, GROUNDS, ground)),
        "color": replace(
            wanted, objects=rest((other(rng, COLORS, *(c for c, _ in objects)), kind))
        ),
        "shape": replace(
            wanted, objects=rest((color, other(rng, KINDS, *(k for _, k in objects))))
        ),
        "count": Expectation(ground, (objects[0],) * int(other(rng, (2, 3, 4), len(objects)))),
    }
    if wanted.relation:
        wrong["relation"] = replace(wanted, relation=other(rng, RELATIONS, wanted.relation))
    if not alike and objects[0][0] != objects[1][0] and objects[0][1] != objects[1][1]:
        swapped = ((objects[1][0], objects[0][1]), (objects[0][0], objects[1][1]))
        wrong["pairing"] = replace(wanted, objects=swapped)
    return {reason: say(expectation) for reason, expectation in wrong.items()}


def blurred(image: np.ndarray, radius: float = 0.6) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image: np.ndarray, rng: np.random.Generator, sigma: float = 6) -> np.ndarray:
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


# -- accepted
# --------------------------------------------------------------------------------------------


def test_true_scenes_are_accepted(
    true_scenes: list[tuple[Scene, np.ndarray]], found_in_true_scenes: list[Found]
) -> None:
    seen = zip(true_scenes, found_in_true_scenes, strict=True)
    accepted, refused = share_accepted(
        [(scene.caption, judge(found, scene.caption)) for (scene, _), found in seen]
    )
    print(f"true scenes accepted: {accepted:.1%}")
    assert accepted >= 0.99, (
        f"accepted {accepted:.1%} of {len(true_scenes)} true scenes; refused {refused}"
    )


def test_every_shape_is_found_exactly(
    true_scenes: list[tuple[Scene, np.ndarray]], found_in_true_scenes: list[Found]
) -> None:
    for (scene, _), found in zip(true_scenes[:200], found_in_true_scenes):
        assert found.ground == scene.ground
        drawn = {(s.color, s.kind, float(s.x), float(s.y), s.radius) for s in scene.shapes}
        assert {(o.color, o.kind, o.x, o.y, o.radius) for o in found.objects} == drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ground", GROUNDS)
def test_every_kind_color_and_radius_is_told_apart_on_every_ground(ground: str, kind: str) -> None:
    for color in COLORS:
        for radius in RADII:
            scene = Scene(ground, (Shape(kind, color, 48, 44, radius),), "single", "")
            (thing,) = find_objects(blurred(render(scene))).objects
            assert (thing.color, thing.kind, thing.radius) == (color, kind, radius)


def tinted(image: np.ndarray, tint: np.ndarray | float) -> np.ndarray:
    return np.clip(image + tint, 0, 255).astype(np.uint8)


DEGRADED: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "blur 0.6": lambda image, rng: blurred(image),
    "blur 1.0": lambda image, rng: blurred(image, 1.0),
    "noise sigma 6": noisy,
    "blur 0.6 + noise sigma 6": lambda image, rng: noisy(blurred(image), rng),
    "brighter by 20": lambda image, rng: tinted(image, 20.0),
    "darker by 20": lambda image, rng: tinted(image, -20.0),
    "each channel off by up to 10": lambda image, rng: tinted(image, rng.uniform(-10, 10, 3)),
}


@pytest.mark.parametrize("how", DEGRADED)
def test_degraded_true_scenes_are_accepted(
    true_scenes: list[tuple[Scene, np.ndarray]], how: str
) -> None:
    rng = np.random.default_rng(2)
    degraded = [(DEGRADED[how](image, rng), scene.caption) for scene, image in true_scenes[:200]]
    accepted, refused = rate(degraded)
    print(f"{how}: accepted {accepted:.1%}")
    assert accepted >= 0.97, f"{how}: accepted {accepted:.1%}; refused {refused}"


def test_specks_are_ignored_and_smudges_are_not() -> None:
    image = render(scenes(1, seed=3, category="single")[0])
    corner = image.copy()
    corner[1, 1:6] = 30  # 5 pixels
    smudge = image.copy()
    smudge[1:3, 1:5] = 30  # 8 pixels
    assert len(find_objects(corner).objects) == 1
    assert len(find_objects(smudge).objects) == 2


def test_a_pil_image_is_checked_like_its_array() -> None:
    (scene,) = scenes(1, seed=4)
    image = render(scene)
    assert check(Image.fromarray(image), scene.caption) == check(image, scene.caption)


# -- rejected
# --------------------------------------------------------------------------------------------


def test_true_scenes_under_a_wrong_caption_are_rejected(
    true_scenes: list[tuple[Scene, np.ndarray]], found_in_true_scenes: list[Found]
) -> None:
    rng = np.random.default_rng(6)
    rejected = []
    for (scene, _), found in zip(true_scenes, found_in_true_scenes, strict=True):
        rejected += [
            not judge(found, caption).ok for caption in wrong_captions(scene, rng).values()
        ]
    share = float(np.mean(rejected))
    print(f"wrong captions rejected: {share:.1%} of {len(rejected)}")
    assert share >= 0.99, f"rejected {share:.1%} of {len(rejected)} wrong captions"


@pytest.mark.parametrize("degraded", [False, True], ids=["clean", "degraded"])
@pytest.mark.parametrize("wrongness", ["ground", "color", "shape", "count", "relation", "pairing"])
def test_each_wrongness_is_rejected_for_its_own_reason(wrongness: str, degraded: bool) -> None:
    rng = np.random.default_rng(7)
    category = {"relation": "relation", "pairing": "two objects"}.get(wrongness)
    named = []
    for scene in scenes(100, seed=8, category=category):
        caption = wrong_captions(scene, rng).get(wrongness)
        if caption is not None:
            image = noisy(blurred(render(scene)), rng) if degraded else render(scene)
            reasons = check(image, caption).reasons
            named.append(len(reasons) == 1 and reasons[0].startswith(wrongness))
    share = float(np.mean(named))
    print(f"{wrongness}: {share:.1%} of {len(named)}")
    assert share >= 0.99, (
        f"{wrongness}: only {share:.1%} of {len(named)} rejected for that reason alone"
    )


def test_a_missing_object_is_rejected(true_scenes: list[tuple[Scene, np.ndarray]]) -> None:
    several = [scene for scene, _ in true_scenes if len(scene.shapes) > 1][:200]
    images = [(render(replace(scene, shapes=scene.shapes[1:])), scene.caption) for scene in several]
    accepted, _ = rate(images)
    assert accepted == 0, (
        f"accepted {accepted:.1%} of {len(several)} scenes without one of their objects"
    )


def test_an_extra_object_is_rejected(true_scenes: list[tuple[Scene, np.ndarray]]) -> None:
    rng = np.random.default_rng(9)
    images = []
    for scene, _ in true_scenes[:250]:
        x, y = (4 * rng.integers(3, 22, size=2)).tolist()
        extra = Shape(str(rng.choice(KINDS)), str(rng.choice(list(COLORS))), x, y, 8)
        if all(max(abs(extra.x - s.x), abs(extra.y - s.y)) >= 12 + s.radius for s in scene.shapes):
            images.append((render(replace(scene, shapes=(*scene.shapes, extra))), scene.caption))
    accepted, _ = rate(images)
    assert len(images) > 100
    assert accepted == 0, f"accepted {accepted:.1%} of {len(images)} scenes with an extra object"


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_needs_the_clear_axis_to_lead(relation: str) -> None:
    """On the multiples of 4 of the domain: a lead of 12 is clear, one of 8 is not, whatever the
    direction.
    """
    along = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    for lead in (RELATION_LEAD, RELATION_LEAD - 4):
        for sideways in (-16, -12, 12, 16):
            length = abs(sideways) + lead
            dx, dy = (along[i] * length + along[1 - i] ** 2 * sideways for i in (0, 1))
            first, second = (
                Shape("ring", "red", 48 + dx, 48 + dy, 8),
                Shape("triangle", "blue", 48, 48, 8),
            )
            image = render(Scene("white", (first, second), "relation", ""))
            caption = "a red ring {} a blue triangle on white"
            assert check(image, caption.format(relation)).ok == (lead == RELATION_LEAD)
            assert not check(image, caption.format(OPPOSITE[relation])).ok


def test_a_relation_of_two_alike_holds_in_either_order() -> None:
    shapes = (Shape("ring", "red", 28, 48, 8), Shape("ring", "red", 68, 48, 8))
    image = render(Scene("white", shapes, "relation", ""))
    for relation, holds in {"left of": True, "right of": True, "above": False}.items():
        assert check(image, f"a red ring {relation} a red ring on white").ok == holds


RED_SQUARE = Shape("square", "red", 32, 48, 16)
RED_CIRCLE = Shape("circle", "red", 48, 48, 20)
DEFECTS = {
    "two that touch": ((RED_SQUARE, replace(RED_SQUARE, x=60)), "two red squares"),
    "two colors that touch": (
        (RED_SQUARE, Shape("bar", "blue", 62, 48, 16)),
        "a red square and a blue bar",
    ),
    "one over the other": ((RED_CIRCLE, Shape("circle", "blue", 48, 48, 8)), "a red circle"),
    "a filled ring": (
        (replace(RED_CIRCLE, kind="ring"), replace(RED_CIRCLE, radius=12)),
        "a red ring",
    ),
    "a mark inside": ((RED_SQUARE, Shape("bar", "black", 32, 48, 8)), "a red square"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_rejected(defect: str) -> None:
    shapes, noun = DEFECTS[defect]
    verdict = check(render(Scene("white", shapes, "single", "")), f"{noun} on white")
    assert not verdict.ok, f"{defect}: accepted as {verdict.found}"


DX, DY = np.meshgrid(np.arange(96) - 47.5, np.arange(96) - 47.5)
BAD_SHAPES = {
    "diamond": lambda r: abs(DX) + abs(DY) < r,
    "half disc": lambda r: (np.hypot(DX, DY) < r) & (DX < 0),
    "ellipse": lambda r: np.hypot(DX / 1.35, DY) < r / 1.1,
    "oblong": lambda r: (abs(DX) < r) & (abs(DY) < r / 1.35),
    "triangle pointing down": lambda r: (r >= DY) & (-0.8 * r <= DY) & (abs(DX) <= (r - DY) / 1.8),
    "upright bar": lambda r: (abs(DX) < 0.4 * r) & (abs(DY) < r),
    "thin ring": lambda r: (np.hypot(DX, DY) < r) & (np.hypot(DX, DY) > 0.75 * r),
    "ring with a small hole": lambda r: (np.hypot(DX, DY) < r) & (np.hypot(DX, DY) > 0.4 * r),
}


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_a_shape_of_no_kind_is_unclear(shape: str) -> None:
    for radius in RADII:
        image = render(Scene("white", (), "single", ""))
        image[BAD_SHAPES[shape](radius)] = COLORS["red"]
        (thing,) = find_objects(image).objects
        assert thing.kind is None, (
            f"{shape} of radius {radius}: {thing}, overlap {thing.overlap:.2f}"
        )


def test_an_object_cut_off_by_the_edge_is_rejected() -> None:
    whole = render(Scene("white", (Shape("square", "red", 24, 48, 20),), "single", ""))
    verdict = check(np.roll(whole, -10, axis=1), "a red square on white")
    assert any(reason.startswith("edge") for reason in verdict.reasons), verdict


def test_a_ground_that_is_not_plain_is_rejected() -> None:
    (scene,) = scenes(1, seed=10, category="single")
    image = render(replace(scene, ground="pink"))
    caption = f"{scene.caption.rsplit(' ', 1)[0]} pink"
    sand = render(replace(scene, ground="sand"))
    assert check(image, caption).ok
    assert check(np.concatenate([image[:88], sand[88:]]), caption).reasons[0].startswith("ground")


def test_degenerate_images_are_rejected() -> None:
    rng = np.random.default_rng(11)
    captions = [scene.caption for scene in scenes(50, seed=12)]
    blank = [
        np.full((96, 96, 3), color, np.uint8) for color in (*GROUNDS.values(), *COLORS.values())
    ]
    static = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(10)]
    patches = [rng.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(10)]
    blocks = [patch.repeat(4, axis=0).repeat(4, axis=1) for patch in patches]
    for image in (*blank, *static, *blocks):
        found = find_objects(image)
        assert not any(judge(found, caption).ok for caption in captions)


@pytest.mark.parametrize(
    "image", [np.zeros((96, 96, 3), np.float32), np.zeros((384, 384, 3), np.uint8)]
)
def test_an_image_of_another_size_or_dtype_is_a_bug_of_the_caller(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a scene is uint8 \[96, 96, 3\], not "):
        check(image, "a red circle on white")


# -- components
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_components_are_those_of_a_flood_fill(density: float) -> None:
    mask = np.random.default_rng(13).random((19, 33)) < density
    labels, seen = label_components(mask), np.full(mask.shape, -1)
    for start in range(mask.size):
        stack = [divmod(start, 33)]
        while stack:
            y, x = stack.pop()
            if 0 <= y < 19 and 0 <= x < 33 and mask[y, x] and seen[y, x] < 0:
                seen[y, x] = start
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    np.testing.assert_array_equal(labels, seen)
