"""The image vocabulary of the demo model: one code for every look a 4 x 4 patch of a scene can
have.

A code names a pattern (which pixels of the patch a shape covers, 196 of them over all shapes and
radii) and a color. The ground behind a partly covered patch is not in its code: the image decoder
reads it off the neighborhood. Codes 0..3 are the plain grounds, 4..99 the same grounds in the
first column, other ones for each of the 24 grid rows, 100..103 those of the last column. (A
convolutional tokenizer gives border patches separate codes too, since its padding shows, and
other models end every row with a token for it. Without them nothing in plain ground tells the model
where it is: from RoPE alone it knew the row to within four after 2,300 steps.) Then 195 patterns
for each of the 8 colors.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np

from ssd_export.demo.scenes import COLORS, GROUNDS, KINDS, PATCH, RADII, SIZE, Scene, Shape, stamp

GRID = SIZE // PATCH
NUM_GROUNDS = len(GROUNDS)
LAST_COLUMN = (
    1 + GRID
)  # kinds of plain ground: 0 inside, 1 + grid row in the first column, LAST_COLUMN
NUM_GROUND_CODES = (LAST_COLUMN + 1) * NUM_GROUNDS
_GROUND_CODE = {name: code for code, name in enumerate(GROUNDS)}
_COLOR_INDEX = {name: index for index, name in enumerate(COLORS)}


def patches_of(image: np.ndarray) -> np.ndarray:
    """Square image [n, n] -> its patches in raster order, [(n / 4)^2, 16]."""
    side = image.shape[0] // PATCH
    return (
        image.reshape(side, PATCH, side, PATCH)
        .transpose(0, 2, 1, 3)
        .reshape(side * side, PATCH * PATCH)
    )


@lru_cache(maxsize=1)
def patterns() -> np.ndarray:
    """Distinct coverages of a patch, float32 [196, 16], the empty one first."""
    stamps = [patches_of(stamp(kind, radius)) for kind in KINDS for radius in RADII]
    distinct = np.unique(np.concatenate(stamps), axis=0)
    assert not distinct[0].any(), "the empty patch sorts first"
    return distinct


def num_codes() -> int:
    """The size of the image vocabulary."""
    return NUM_GROUND_CODES + (len(patterns()) - 1) * len(COLORS)


@cache
def _stamp_patterns(kind: str, radius: int) -> np.ndarray:
    """Pattern index of each patch of a shape, int64 [radius / 2, radius / 2]."""
    index = {pattern.tobytes(): number for number, pattern in enumerate(patterns())}
    numbers = [index[patch.tobytes()] for patch in patches_of(stamp(kind, radius))]
    side = 2 * radius // PATCH
    return np.array(numbers).reshape(side, side)


def encode_scene(scene: Scene) -> np.ndarray:
    """Image tokens of a scene, int64 [576] in raster order."""
    grid = np.full((GRID, GRID), _GROUND_CODE[scene.ground])
    grid[:, 0] += NUM_GROUNDS * (1 + np.arange(GRID))
    grid[:, -1] += NUM_GROUNDS * LAST_COLUMN
    for shape in scene.shapes:
        _stamp_codes(grid, shape)
    return grid.reshape(-1)


def caption_tokens(scene: Scene) -> np.ndarray:
    """Tokens that only the caption tells, not the tokens before them. bool [576].

    The image's first token (the ground), each shape's first token (color and kind), and the
    token at which a shape parts from another kind that has looked the same so far, as a ring does
    from a circle at its hole.
    """
    grid = np.zeros((GRID, GRID), bool)
    grid[0, 0] = True
    for shape in scene.shapes:
        _box(grid, shape)[_telling(shape.kind, shape.radius)] = True
    return grid.reshape(-1)


@cache
def _telling(kind: str, radius: int) -> np.ndarray:
    """First token of a shape, and where it parts from other kinds of its size, bool [radius / 2,
    radius / 2].
    """
    own = _stamp_patterns(kind, radius)
    telling = np.zeros(own.size, bool)
    telling[np.flatnonzero(own)[0]] = True
    for other in KINDS:
        if other != kind:
            differs = np.flatnonzero(own != _stamp_patterns(other, radius))
            telling[differs[0]] |= own.flat[differs[0]] > 0
    return telling.reshape(own.shape)


def _stamp_codes(grid: np.ndarray, shape: Shape) -> None:
    pattern = _stamp_patterns(shape.kind, shape.radius)
    covered = pattern > 0
    _box(grid, shape)[covered] = code_of(pattern[covered], _COLOR_INDEX[shape.color])


def _box(grid: np.ndarray, shape: Shape) -> np.ndarray:
    """The part of a grid [24, 24] that a shape can cover, [radius / 2, radius / 2], not a copy."""
    left, top, side = (
        (shape.x - shape.radius) // PATCH,
        (shape.y - shape.radius) // PATCH,
        2 * shape.radius // PATCH,
    )
    return grid[top : top + side, left : left + side]


def code_of(pattern: np.ndarray, color: int | np.ndarray) -> np.ndarray:
    """Code of a pattern (1..195) in a color (0..7)."""
    return NUM_GROUND_CODES + color * (len(patterns()) - 1) + pattern - 1


@lru_cache(maxsize=1)
def factors() -> tuple[np.ndarray, np.ndarray]:
    """Pattern and paint of every code, int64 [V] each.

    Patterns: 0 plain ground, 1..195 shapes, 196..220 plain ground at a border. Paints: 0..3
    grounds, 4..11 colors.
    """
    shaped = np.arange(num_codes() - NUM_GROUND_CODES)
    ground = np.arange(NUM_GROUND_CODES)
    per_color = len(patterns()) - 1
    place = ground // NUM_GROUNDS
    pattern = np.concatenate([np.where(place == 0, 0, per_color + place), shaped % per_color + 1])
    paint = np.concatenate([ground % NUM_GROUNDS, shaped // per_color + NUM_GROUNDS])
    return pattern, paint
