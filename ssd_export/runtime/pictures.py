"""Pictures to PNG files: whole or absent, checked before the work, what they were made from inside
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssd_export.errors import UserError
from ssd_export.files import check_file, write_file

MARGIN = 4  # pixels between the pictures of a sheet
PAPER = (255, 255, 255)


def picture_paths(out: Path, num_images: int) -> list[Path]:
    """Where single pictures go: one to out itself, several to out-000.png, ... beside the sheet
    out.png.
    """
    if num_images == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{index:03d}{out.suffix}") for index in range(num_images)]


def check_pictures(out: Path, num_images: int) -> None:
    """Returns if num_images pictures can be written to out. Raises: UserError, before any work is
    done.
    """
    if out.suffix.lower() != ".png":
        raise UserError(
            f"{out} does not end in .png, and pictures are written as PNG; use"
            f" {out.with_suffix('.png')}"
            if out.name and not out.is_dir()
            else f"{out} is a folder; use {out / 'out.png'}"
        )
    for path in {out, *picture_paths(out, num_images)}:
        check_file(path)


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All pictures (of one size) on one, row by row, about as wide as high; one picture is its own
    sheet.
    """
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (side + MARGIN for side in images[0].size)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    for index, image in enumerate(images):
        sheet.paste(image, (MARGIN + index % columns * width, MARGIN + index // columns * height))
    return sheet


def write_pictures(
    out: Path,
    images: Sequence[Image.Image],
    texts: Sequence[Mapping[str, str]],
    sheet_text: Mapping[str, str],
) -> list[Path]:
    """Writes one picture to out, several as a sheet at out and single files beside it; the paths,
    out first.

    Args: texts: the text chunks of each picture.
    Raises: UserError when the disk is full or not writable.
    """
    paths = picture_paths(out, len(images))
    for path, image, text in zip(paths, images, texts):
        write_png(path, image, text)
    if len(images) > 1:
        write_png(out, contact_sheet(images), sheet_text)
    return [out, *paths] if len(images) > 1 else paths


def write_png(path: Path, image: Image.Image, text: Mapping[str, str]) -> None:
    """Writes a PNG with a text chunk for each key, whole or not at all. Raises: UserError as
    write_file.
    """
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    write_file(path, lambda file: image.save(file, format="PNG", pnginfo=chunks))
