"""Contact sheets that can be read: the caption under each image, a red frame and the reason where
it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, WRONG = (255, 255, 255), (20, 20, 20), (200, 20, 20)
LEAST_WIDTH = 192  # pixels of an image on the sheet: four words of a caption on one line
MARGIN, FRAME, FONT_SIZE, LINE = 10, 4, 14, 17
MAX_COLUMNS = 12
CAPTION_LINES, REASON_LINES = 3, 2


@dataclass(frozen=True)
class Entry:
    """One image of a sheet; wrong: why the image is not what its caption says, "" if it is."""

    image: Image.Image
    caption: str
    wrong: str = ""


def captioned_sheet(entries: Sequence[Entry], columns: int | None = None) -> Image.Image:
    """All images on one sheet, row by row, each with its caption in full."""
    columns = columns or min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(1.4 * len(entries)))))
    width = max(LEAST_WIDTH, *(entry.image.width for entry in entries))
    cell_width, cell_height = (
        width + 2 * MARGIN,
        width + 2 * MARGIN + LINE * (CAPTION_LINES + REASON_LINES),
    )
    rows = math.ceil(len(entries) / columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), PAPER)
    for index, entry in enumerate(entries):
        place = (index % columns * cell_width + MARGIN, index // columns * cell_height + MARGIN)
        _paste(sheet, entry, place, width)
        bottom = place[1] + width + FRAME
        bottom = _write(sheet, entry.caption, (place[0], bottom), width, CAPTION_LINES, INK)
        if entry.wrong:
            _write(sheet, entry.wrong, (place[0], bottom), width, REASON_LINES, WRONG)
    return sheet


def comparison_sheet(
    captions: Sequence[str], rows: Sequence[tuple[str, Sequence[Entry]]]
) -> Image.Image:
    """Captions across, one row of images for each named choice: the same prompt and seed stand
    above each other.
    """
    width = max(
        LEAST_WIDTH * 2 // 3, *(entry.image.width for _, entries in rows for entry in entries)
    )
    left, top, cell = 150, LINE * (CAPTION_LINES + 2) + MARGIN, width + MARGIN
    sheet = Image.new("RGB", (left + cell * len(captions), top + cell * len(rows)), PAPER)
    for column, caption in enumerate(captions):
        _write(sheet, caption, (left + column * cell, MARGIN), width, CAPTION_LINES + 2, INK)
    for index, (label, entries) in enumerate(rows):
        y = top + index * cell
        _write(sheet, label, (MARGIN, y), left - 2 * MARGIN, 6, INK)
        for column, entry in enumerate(entries):
            _paste(sheet, entry, (left + column * cell, y), width)
    return sheet


def _paste(sheet: Image.Image, entry: Entry, place: tuple[int, int], width: int) -> None:
    height = width * entry.image.height // entry.image.width
    sheet.paste(entry.image.resize((width, height), Image.Resampling.NEAREST), place)
    if entry.wrong:
        corner = (place[0] + width + FRAME - 1, place[1] + height + FRAME - 1)
        ImageDraw.Draw(sheet).rectangle(
            (place[0] - FRAME, place[1] - FRAME, *corner), outline=WRONG, width=FRAME
        )


def _write(
    sheet: Image.Image,
    text: str,
    place: tuple[int, int],
    width: int,
    lines: int,
    ink: tuple[int, int, int],
) -> int:
    """Writes at most `lines` lines of text into the width; the y below the last one."""
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(sheet)
    x, y = place
    for line in wrapped(text, lambda part: font.getlength(part) <= width, lines):
        draw.text((x, y), line, ink, font)
        y += LINE
    return y


def wrapped(text: str, fits: Callable[[str], bool], max_lines: int) -> list[str]:
    """The words of text in lines that fit, "..." at the end if there are too many."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and fits(joined):
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and not fits(f"{last} ..."):
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()} ..."]
