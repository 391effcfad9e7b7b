"""Pictures to PNG files: whole or absent, checked before the work, what they were made from inside
them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssd_export.errors import UserError

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


def check_file(path: Path) -> None:
    """Returns if a file can be written there. Raises: UserError for a folder, or one missing or
    read-only.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, such as {path / path.name}")
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent} for {path.name}; make it, or choose another place"
        )
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Returns if files can be made in the folder. Raises: UserError."""
    probe = folder / f".writable-{os.urandom(4).hex()}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write in {folder} ({error.strerror}); choose another folder"
        ) from error


def make_folder(folder: Path) -> None:
    """Makes the folder with its parents, or returns if it is there and writable. Raises:
    UserError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder} ({error.strerror}); choose another"
        ) from error
    check_folder(folder)


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


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write with a file that becomes path at the end; on failure or Ctrl-C path is as it was.

    Raises: UserError when the disk is full or not writable.
    """
    partial = path.with_name(f"{path.name}.partial-{os.urandom(4).hex()}")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); free space or choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
