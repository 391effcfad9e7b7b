"""Captioned scenes: plain grounds with one to four flat shapes, the demo model's whole world.

Coordinates are pixels of a 96 x 96 image; a center (x, y) is the corner shared by four pixels.
Centers lie on multiples of 4 and radii on `RADII`, so every shape covers the 24 x 24 grid of 4 x 4
patches in the same way wherever it stands: the image tokens see few distinct patches, and a small
model learns exact shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 96
PATCH = 4
MARGIN = 4
GAP = 4

GROUNDS = {
    "white": (245, 245, 245),
    "gray": (190, 190, 190),
    "pink": (250, 205, 215),
    "sand": (235, 225, 190),
}
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "cyan": (40, 200, 220),
    "black": (30, 30, 30),
}
KINDS = ("circle", "square", "triangle", "cross", "ring", "bar")
RADII = (8, 12, 16, 20)
CATEGORIES = ("single", "counting", "two objects", "relation")
CLASS_CATEGORIES = CATEGORIES[:2]  # scenes of equal shapes
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATION_LEAD = 12
CenterChooser = Callable[[np.random.Generator, list[int]], "list[tuple[int, int]] | None"]
_RADII_OF = {
    "single": (12, 16, 20),
    "counting": (8, 12),
    "two objects": (8, 12, 16),
    "relation": (8, 12, 16),
}


@dataclass(frozen=True)
class Shape:
    """One flat shape; x, y: center in pixels (multiples of 4), radius: one of RADII."""

    kind: str
    color: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Scene:
    """A ground and its objects, with the caption that describes them."""

    ground: str
    shapes: tuple[Shape, ...]
    category: str
    caption: str


def shape_coverage(kind: str, radius: float, x: float, y: float) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [96, 96] in 0..1, from 2 x 2 samples a
    pixel.
    """
    sample = (np.arange(2 * SIZE, dtype=np.float32) + 0.5) / 2
    dx, dy = sample[None, :] - x, sample[:, None] - y
    inside = _inside(kind, radius, dx, dy)
    return inside.reshape(SIZE, 2, SIZE, 2).mean(axis=(1, 3), dtype=np.float32)


def _inside(kind: str, r: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    distance = np.hypot(dx, dy)
    match kind:
        case "circle":
            return distance <= r
        case "ring":
            return (distance <= r) & (distance >= 0.55 * r)
        case "square":
            return (abs(dx) <= 0.88 * r) & (abs(dy) <= 0.88 * r)
        case "bar":
            return (abs(dx) <= r) & (abs(dy) <= 0.4 * r)
        case "cross":
            long_x, long_y = abs(dx) <= r, abs(dy) <= r
            return (long_x & (abs(dy) <= 0.33 * r)) | (long_y & (abs(dx) <= 0.33 * r))
        case "triangle":
            return (dy >= -r) & (dy <= 0.8 * r) & (abs(dx) <= (dy + r) / 1.8)
    raise ValueError(f"unknown shape {kind!r}")


@cache
def stamp(kind: str, radius: int) -> np.ndarray:
    """Coverage of a shape on its own square of pixels, float32 [2 radius, 2 radius] (read only)."""
    center = SIZE // 2
    part = shape_coverage(kind, radius, center, center)[
        center - radius : center + radius, center - radius : center + radius
    ]
    part.setflags(write=False)
    return part


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 [96, 96, 3]."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = GROUNDS[scene.ground]
    for shape in scene.shapes:
        rows = slice(shape.y - shape.radius, shape.y + shape.radius)
        columns = slice(shape.x - shape.radius, shape.x + shape.radius)
        alpha = stamp(shape.kind, shape.radius)[..., None]
        color = np.asarray(COLORS[shape.color], np.float32)
        image[rows, columns] += alpha * (color - image[rows, columns])
    return np.rint(image).astype(np.uint8)


def random_scene(
    rng: np.random.Generator, category: str | None = None, composed: bool = True
) -> Scene:
    """A scene of the category (or of a random one): shapes fully inside, at least GAP apart.

    Composed scenes, the demo model's own, stand as a person would lay them out: one shape near the
    middle, two side by side or one above the other, three in a triangle, four in a square, each
    moved a little by chance; of two objects without a relation the first named is the left or the
    upper one. Otherwise shapes stand anywhere.
    """
    category = category or str(rng.choice(CATEGORIES))
    while True:
        scene = _draw(rng, category, _composed_centers if composed else _free_centers)
        if scene is not None:
            return scene


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept from training: one in eight, by its hash, so that the split needs
    no file.
    """
    return hashlib.sha256(caption.encode()).digest()[0] % 8 == 0


def _draw(rng: np.random.Generator, category: str, centers_of: CenterChooser) -> Scene | None:
    """One attempt; None where the shapes found no room or no clear relation."""
    ground = str(rng.choice(list(GROUNDS)))
    looks = _looks(rng, category)
    radii = rng.choice(_RADII_OF[category], size=len(looks)).tolist()
    if category == "counting":
        radii = radii[:1] * len(looks)
    centers = centers_of(rng, radii)
    if centers is None:
        return None
    if category == "relation" and rng.random() < 0.5:
        centers, radii = centers[::-1], radii[::-1]
    shapes = [
        Shape(kind, color, x, y, r)
        for (color, kind), (x, y), r in zip(looks, centers, radii, strict=True)
    ]
    caption = _caption(category, shapes, ground)
    return None if caption is None else Scene(ground, tuple(shapes), category, caption)


def _looks(rng: np.random.Generator, category: str) -> list[tuple[str, str]]:
    """Color and kind of each shape: all alike when counting, all different otherwise."""
    number = {"single": 1, "counting": int(rng.integers(2, 5))}.get(category, 2)
    looks = [(str(rng.choice(list(COLORS))), str(rng.choice(KINDS))) for _ in range(number)]
    if category == "counting":
        return [looks[0]] * number
    while len(set(looks)) < number:
        looks[1] = (str(rng.choice(list(COLORS))), str(rng.choice(KINDS)))
    return looks


def _composed_centers(rng: np.random.Generator, radii: list[int]) -> list[tuple[int, int]]:
    """Centers in reading order: anchors for that many shapes, each moved by at most a patch."""
    near, middle, far = SIZE // 4, SIZE // 2, 3 * SIZE // 4
    anchors = {
        1: [[(middle, middle)]],
        2: [[(near, middle), (far, middle)], [(middle, near), (middle, far)]],
        3: [[(middle, near), (near, far), (far, far)], [(near, near), (far, near), (middle, far)]],
        4: [[(near, near), (far, near), (near, far), (far, far)]],
    }[len(radii)]
    chosen = np.array(anchors[int(rng.integers(len(anchors)))])
    moved = chosen + PATCH * rng.integers(-1, 2, size=chosen.shape)
    return [(x, y) for x, y in moved.tolist()]


def _free_centers(rng: np.random.Generator, radii: list[int]) -> list[tuple[int, int]] | None:
    """Centers anywhere, GAP apart; None where one found no room in 20 attempts."""
    centers: list[tuple[int, int]] = []
    for radius in radii:
        low, high = (radius + MARGIN) // PATCH, (SIZE - radius - MARGIN) // PATCH
        for _ in range(20):
            x, y = (PATCH * int(n) for n in rng.integers(low, high + 1, size=2))
            if all(
                max(abs(x - a), abs(y - b)) >= radius + r + GAP
                for (a, b), r in zip(centers, radii, strict=False)
            ):
                centers.append((x, y))
                break
        else:
            return None
    return centers


def _caption(category: str, shapes: list[Shape], ground: str) -> str | None:
    first = shapes[0]
    match category:
        case "single":
            return f"{_noun(first)} on {ground}"
        case "counting":
            return f"{NUMBERS[len(shapes)]} {first.color} {plural(first.kind)} on {ground}"
        case "two objects":
            return f"{_noun(first)} and {_noun(shapes[1])} on {ground}"
        case "relation":
            relation = relation_of(first, shapes[1])
            return relation and f"{_noun(first)} {relation} {_noun(shapes[1])} on {ground}"
    raise ValueError(f"unknown category {category!r}; choose one of {', '.join(CATEGORIES)}")


def relation_of(first: Shape, second: Shape) -> str | None:
    """The relation of the first shape to the second, if one axis leads by RELATION_LEAD pixels or
    more.
    """
    dx, dy = first.x - second.x, first.y - second.y
    if abs(abs(dx) - abs(dy)) < RELATION_LEAD:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def plural(kind: str) -> str:
    """The plural of a shape."""
    return kind + ("es" if kind == "cross" else "s")


def _noun(shape: Shape) -> str:
    return f"{'an' if shape.color == 'orange' else 'a'} {shape.color} {shape.kind}"
