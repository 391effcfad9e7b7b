"""Whether an image shows what its caption says: an exact, rule-based score for scenes.

The image alone decides what is found; the caption is looked at last. Rules, cited by number
below:

C1  Ground. The median of the border is within 24 levels of a ground in each channel; of several the
nearest,
    where brightness counts half, because a decoder shifts it more easily than hue.
C2  Plain. At least 60 % of the image is ground, and away from the objects at most 1 % of it is
stained
    (further than 32 from the median ground). Specks of fewer than 6 pixels are no objects, only
    stain.
C3  Object. A 4-connected set of 6 or more pixels that are covered: further than 48 from the median
ground,
    and than .44 of their furthest neighbor (below one half, so that half-covered edges fall on one
    side). Every object counts, clean or not: a smudge is one object too many.
C4  Color. The median of the half of its pixels that is furthest from the ground is within 60 of
the nearest
    color, and at least 95 % of its inner pixels are within 40 of a mix of that median and the
    ground.
C5  Shape. The kind of the ideal shape, radius 7 to 21, with the best intersection over union, which
is at
    least 0.86 and leads every other kind by 0.02. (True shapes keep 0.90 under a Gaussian blur of 1
    pixel; a diamond is 0.85 of a circle.) Two touching shapes are one object and fail here or in
    C4.
C6  Inside. No object reaches the outermost pixels.
C7  Caption. The same ground and the same multiset of (color, kind).
C8  Relation. The centers differ by RELATION_LEAD or more in the said direction than on the other
axis, less
    2 pixels for the measurement.

Distances are Euclidean in RGB levels. Images come from a VQ decoder: slight blur, tint and noise
pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from ssd_export.demo.captions import Expectation, parse_caption
from ssd_export.demo.scenes import COLORS, GROUNDS, KINDS, RELATION_LEAD, SIZE, shape_coverage

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_GROUND_TINT = 24
MIN_GROUND_SHARE = 0.6
STAIN_DISTANCE = 32
MAX_STAIN_SHARE = 0.01
OBJECT_DISTANCE = 48
COVERED = 0.44
MIN_OBJECT_PIXELS = 6
MAX_COLOR_DISTANCE = 60
MAX_MIX_DISTANCE = 40
MIN_COLOR_SHARE = 0.95
FIT_RADII = range(7, 22)
MIN_OVERLAP = 0.86
MIN_OVERLAP_LEAD = 0.02
RELATION_TOLERANCE = 2
_FIT = 48  # pixels: the widest shape, 2 x 21, and its search range


@dataclass(frozen=True)
class FoundObject:
    """One object; color or kind is None where unclear; x, y, radius in pixels: of the best ideal
    shape.
    """

    color: str | None
    kind: str | None
    x: float
    y: float
    radius: int
    overlap: float
    inside: bool

    def __str__(self) -> str:
        return f"{self.color or 'unclear'} {self.kind or 'blob'} at ({self.x:g}, {self.y:g})"


@dataclass(frozen=True)
class Found:
    """Objects found in an image; ground is None, and objects is empty, where there is no plain
    ground.
    """

    ground: str | None
    objects: tuple[FoundObject, ...]


@dataclass(frozen=True)
class Verdict:
    """ok, or the reasons: each starts with ground, edge, count, color, shape, pairing or
    relation.
    """

    ok: bool
    reasons: tuple[str, ...]
    found: Found


def check(image: np.ndarray | Image, caption: str) -> Verdict:
    """Whether the image shows what the caption says (C1-C8).

    Args:
        image: uint8 [96, 96, 3], or a PIL image of that size.
        caption: a caption of `captions`.
    Raises:
        UserError: the caption is outside the language.
        ValueError: the image has another size or dtype.
    """
    return judge(find_objects(image), caption)


def judge(found: Found, caption: str) -> Verdict:
    """Whether what was found in an image is what the caption says (C6-C8); raises UserError like
    `check`.
    """
    reasons = tuple(_reasons(found, parse_caption(caption)))
    return Verdict(not reasons, reasons, found)


def find_objects(image: np.ndarray | Image) -> Found:
    """The ground and the objects of an image, in the reading order of their first pixels
    (C1-C6).
    """
    pixels = _pixels(image)  # [96, 96, 3]
    ground_name, ground = _ground(pixels)
    if ground_name is None:
        return Found(None, ())
    distance = np.linalg.norm(pixels - ground, axis=-1)  # [96, 96]
    furthest = _neighborhood(distance, np.maximum, diagonal=True)
    labels = label_components((distance > OBJECT_DISTANCE) & (distance > COVERED * furthest))
    first, sizes = np.unique(labels[labels >= 0], return_counts=True)
    masks = [labels == label for label in first[sizes >= MIN_OBJECT_PIXELS]]
    if not _plain(distance, masks):
        return Found(None, ())
    return Found(ground_name, tuple(_object(pixels, ground, mask) for mask in masks))


def label_components(mask: np.ndarray) -> np.ndarray:
    """The 4-connected components of a bool [h, w] mask: int [h, w], the index of its first pixel,
    or -1.

    Every pixel takes the least label around it and then the label of that pixel, so a component of
    n pixels settles in about log(n) rounds.
    """
    outside = mask.size
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), outside)
    while True:
        least = np.where(mask, _neighborhood(labels, np.minimum, edge=outside), outside)
        least = np.append(least, outside)[least]
        if np.array_equal(least, labels):
            return np.where(mask, labels, -1)
        labels = least


def _pixels(image: np.ndarray | Image) -> np.ndarray:
    """The image as float32 [96, 96, 3]."""
    pixels = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    if pixels.shape != (SIZE, SIZE, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"a scene is uint8 [{SIZE}, {SIZE}, 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels.astype(np.float32)


def _ground(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The ground's name, or None, and its own color in this image, float32 [3] (C1)."""
    border = np.ones((SIZE, SIZE), bool)
    border[2:-2, 2:-2] = False
    color = np.median(pixels[border], axis=0)
    tints = {name: color - np.asarray(rgb) for name, rgb in GROUNDS.items()}
    near = {name: tint for name, tint in tints.items() if np.abs(tint).max() <= MAX_GROUND_TINT}
    miss = {name: float(np.linalg.norm(tint - tint.mean() / 2)) for name, tint in near.items()}
    return min(miss, key=miss.__getitem__, default=None), color


def _plain(distance: np.ndarray, masks: list[np.ndarray]) -> bool:
    """C2; the two pixels around an object are neither ground nor stain."""
    near = np.any(masks, axis=0) if masks else np.zeros(distance.shape, bool)
    for _ in range(2):
        near = _neighborhood(near, np.maximum, diagonal=True)
    stained = distance > STAIN_DISTANCE
    return (~stained).mean() >= MIN_GROUND_SHARE and stained[~near].mean() <= MAX_STAIN_SHARE


def _object(pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> FoundObject:
    """The object that covers the mask (C4-C6)."""
    kind, radius, x, y, overlap = _fit(mask)
    inside = not (mask[[0, -1]].any() or mask[:, [0, -1]].any())
    return FoundObject(_color(pixels - ground, ground, mask), kind, x, y, radius, overlap, inside)


def _color(unlike: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> str | None:
    """The one color of the mask, or None (C4); unlike: image less ground, [96, 96, 3]."""
    covered = unlike[mask]  # [n, 3]
    distance = np.linalg.norm(covered, axis=-1)
    core = np.median(covered[distance >= np.median(distance)], axis=0)
    name, miss = _nearest(ground + core, COLORS)
    inner = unlike[mask & _neighborhood(mask, np.minimum)]
    inner = inner if len(inner) >= MIN_OBJECT_PIXELS else covered
    mixed = (inner @ core / (core @ core)).clip(COVERED, 1)[:, None] * core
    agree = (np.linalg.norm(inner - mixed, axis=-1) <= MAX_MIX_DISTANCE).mean()
    return name if miss <= MAX_COLOR_DISTANCE and agree >= MIN_COLOR_SHARE else None


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """The palette's nearest name and its distance."""
    distances = {
        name: float(np.linalg.norm(color - np.asarray(rgb))) for name, rgb in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _fit(mask: np.ndarray) -> tuple[str | None, int, float, float, float]:
    """The best ideal shape of a mask: kind (None where unclear), radius, x, y and its overlap
    (C5).
    """
    ideals, masks, areas = _ideals()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = (int(line[0] + line[-1] + 1) // 2 - _FIT // 2 for line in (rows, columns))
    padded = np.pad(mask, _FIT)
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    windows = [
        padded[_FIT + top + dy :, _FIT + left + dx :][:_FIT, :_FIT].ravel() for dy, dx in shifts
    ]
    shared = np.asarray(windows, np.float32) @ masks  # [shifts, ideals]
    overlap = shared / (mask.sum() + areas - shared)
    rival, score = np.sort(overlap.max(axis=0).reshape(len(KINDS), -1).max(axis=1))[-2:].tolist()
    clear = score >= MIN_OVERLAP and score - rival >= MIN_OVERLAP_LEAD
    shift, best = np.unravel_index(overlap.argmax(), overlap.shape)
    kind, radius, x, y = ideals[best]
    dy, dx = shifts[shift]
    return (kind if clear else None), radius, left + dx + x, top + dy + y, score


@lru_cache(maxsize=1)
def _ideals() -> tuple[list[tuple[str, int, float, float]], np.ndarray, np.ndarray]:
    """Every ideal shape in a 48 x 48 window: (kind, radius, x, y), masks float32 [48 * 48, n],
    areas [n].

    Equally many of each kind, kind by kind; the middle of their height is the window's center, at
    whole or at half pixels.
    """
    ideals, masks = [], []
    corner = (SIZE - _FIT) // 2
    for kind in KINDS:
        for radius in FIT_RADII:
            lift = (
                round(0.2 * radius) / 2 if kind == "triangle" else 0.0
            )  # middle .1 r above center
            for x, y in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
                x, y = _FIT / 2 + x, _FIT / 2 + y + lift
                coverage = shape_coverage(kind, radius, corner + x, corner + y)
                masks.append(
                    coverage[corner : corner + _FIT, corner : corner + _FIT].ravel() > COVERED
                )
                ideals.append((kind, radius, x, y))
    stack = np.asarray(masks, np.float32).T.copy()
    return ideals, stack, stack.sum(axis=0)


def _neighborhood(
    values: np.ndarray, pick: np.ufunc, *, diagonal: bool = False, edge: int | None = None
) -> np.ndarray:
    """The least or greatest (`pick`) of each pixel and its 4, or 8, neighbors; outside lies
    `edge`.
    """
    around = (
        np.pad(values, 1, mode="edge") if edge is None else np.pad(values, 1, constant_values=edge)
    )
    across = pick(pick(around[:, :-2], around[:, 1:-1]), around[:, 2:])  # [h + 2, w]
    if diagonal:
        return pick(pick(across[:-2], across[1:-1]), across[2:])
    return pick(pick(around[:-2, 1:-1], across[1:-1]), around[2:, 1:-1])


def _reasons(found: Found, wanted: Expectation) -> list[str]:
    """Every reason why what is found is not what is wanted (C6-C8); empty if it is."""
    if found.ground is None:
        return ["ground: no plain ground of a known color"]
    reasons = []
    if found.ground != wanted.ground:
        reasons.append(f"ground: {found.ground}, not {wanted.ground}")
    reasons += [f"edge: {thing} is cut off" for thing in found.objects if not thing.inside]
    if len(found.objects) != wanted.count:
        return [*reasons, f"count: {len(found.objects)}, not {wanted.count}"]
    looks = [(thing.color, thing.kind) for thing in found.objects]
    differences = [
        _difference("color", [color for color, _ in looks], [color for color, _ in wanted.objects]),
        _difference("shape", [kind for _, kind in looks], [kind for _, kind in wanted.objects]),
    ]
    reasons += [difference for difference in differences if difference]
    if not any(differences) and Counter(looks) != Counter(wanted.objects):
        reasons.append(f"pairing: {' and '.join(map(str, found.objects))}")
    elif not any(differences) and wanted.relation and not _related(found.objects, wanted):
        reasons.append(f"relation: {' and '.join(map(str, found.objects))}, not {wanted.relation}")
    return reasons


def _difference(what: str, found: list[str | None], wanted: list[str]) -> str | None:
    if Counter(found) == Counter(wanted):
        return None
    return f"{what}: {', '.join(name or 'unclear' for name in found)}, not {', '.join(wanted)}"


def _related(things: tuple[FoundObject, ...], wanted: Expectation) -> bool:
    """C8, for any order of the things that has the wanted looks (there are two if the looks are
    alike).
    """
    relation = wanted.relation
    assert relation is not None
    return any(
        _lead(first, second, relation) >= RELATION_LEAD - RELATION_TOLERANCE
        for first, second in permutations(things)
        if ((first.color, first.kind), (second.color, second.kind)) == wanted.objects
    )


def _lead(first: FoundObject, second: FoundObject, relation: str) -> float:
    """Pixels by which the first stands further in the direction of the relation than on the other
    axis.
    """
    dx, dy = first.x - second.x, first.y - second.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along - (abs(dy) if relation in ("left of", "right of") else abs(dx))
