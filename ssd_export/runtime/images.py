"""Images to PNG files: whole or absent, checked before the work, what they were made from inside
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssd_export.errors import UserError
from ssd_export.files import check_file, write_file
from ssd_export.os_errors import is_folder

MARGIN = 4  # pixels between the images of a sheet
PAPER = (255, 255, 255)


def image_paths(out: Path, num_images: int) -> list[Path]:
    """Paths of single images: one is out itself, several are out-000.png, ... beside the sheet
    out.png.
    """
    if num_images == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{index:03d}{out.suffix}") for index in range(num_images)]


def check_images(out: Path, num_images: int) -> None:
    """Returns if num_images images can be written to out. Raises: UserError, before any work is
    done.
    """
    if out.suffix.lower() != ".png":
        raise UserError(
            f"{out} does not end in .png, and images are written as PNG; use"
            f" {out.with_suffix('.png')}"
            if out.name and not out.is_dir()
            else f"{out} is a folder; use {out / 'out.png'}"
        )
    paths = image_paths(out, num_images)
    for path in paths:
        if is_folder(path, "write"):
            raise UserError(f"{path} is a folder; move it away, or choose another --out")
    for path in {out, paths[0], paths[-1]}:  # the last has the longest name
        check_file(path)


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All images (of one size) on one, row by row, about as wide as high; one image is its own
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


def preview_rows(num_previews: int, num_rows: int) -> list[int]:
    """The rows after which that many previews are made: evenly over an image, without its last."""
    count = min(num_previews, num_rows - 1)
    last = num_rows - 2
    return [round(place * last / (count - 1)) if count > 1 else 0 for place in range(count)]


class ImageWriter:
    """Writes the images of one call as they are done: one image to out, several to out-000.png,
    ... and at the end a sheet of all to out.

    Args: texts: the text chunks of each image; sheet_text: those of the sheet.
    """

    def __init__(
        self, out: Path, texts: Sequence[Mapping[str, str]], sheet_text: Mapping[str, str]
    ) -> None:
        self._out, self._texts, self._sheet_text = out, texts, sheet_text
        self._paths = image_paths(out, len(texts))
        self.written: list[Path] = []

    def __call__(self, number: int, image: Image.Image) -> None:
        """Writes an image. Raises: UserError when the disk is full or not writable."""
        write_png(self._paths[number], image, self._texts[number])
        self.written.append(self._paths[number])

    def finish(self, images: Sequence[Image.Image]) -> list[Path]:
        """Writes the sheet where there are several; the paths of all, out first."""
        if len(images) == 1:
            return self._paths
        write_png(self._out, contact_sheet(images), self._sheet_text)
        return [self._out, *self._paths]


def write_png(path: Path, image: Image.Image, text: Mapping[str, str]) -> None:
    """Writes a PNG with a text chunk for each key, whole or not at all. Raises: UserError as
    write_file.
    """
    write_file(path, lambda file: write_png_to(file, image, text))


def write_png_to(file: BinaryIO, image: Image.Image, text: Mapping[str, str]) -> None:
    """Writes a PNG with a text chunk for each key to an open file."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    image.save(file, format="PNG", pnginfo=chunks)
