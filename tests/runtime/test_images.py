"""Images on disk: whole or absent, refused before the work, with their provenance inside."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from ssd_export.errors import UserError
from ssd_export.files import check_file, make_folder, write_file
from ssd_export.runtime.images import (
    MARGIN,
    ImageWriter,
    check_images,
    contact_sheet,
    image_paths,
    write_png,
)


def flat(index: int) -> Image.Image:
    return Image.new("RGB", (24, 16), (10 * index, 20, 30))


def test_one_image_keeps_its_text(tmp_path: Path) -> None:
    text = {"prompt": "a réd circle, 赤い丸\nnew line", "seed": "18446744073709551615", "empty": ""}
    writer = ImageWriter(tmp_path / "out.png", [text], {})
    writer(0, flat(3))
    assert writer.written == writer.finish([flat(3)]) == [tmp_path / "out.png"]
    with Image.open(tmp_path / "out.png") as image:
        assert image.text == text and image.getpixel((0, 0)) == (30, 20, 30)
    assert os.listdir(tmp_path) == ["out.png"]


@pytest.mark.parametrize("count, columns, rows", [(2, 2, 1), (3, 2, 2), (5, 3, 2), (12, 4, 3)])
def test_several_images_are_a_sheet_and_single_files(
    tmp_path: Path, count: int, columns: int, rows: int
) -> None:
    texts = [{"image": str(index)} for index in range(count)]
    images = [flat(index) for index in range(count)]
    writer = ImageWriter(tmp_path / "out.png", texts, {"image": "all"})
    for index, image in enumerate(images):
        writer(index, image)
        assert len(os.listdir(tmp_path)) == index + 1, "each is there as soon as it is done"
    paths = writer.finish(images)
    assert paths[0] == tmp_path / "out.png" and paths[1:] == image_paths(
        tmp_path / "out.png", count
    )
    assert paths[1].name == "out-000.png" and len(os.listdir(tmp_path)) == count + 1
    with Image.open(paths[0]) as sheet:
        assert sheet.size == (columns * (24 + MARGIN) + MARGIN, rows * (16 + MARGIN) + MARGIN)
        assert sheet.text == {"image": "all"}
        for index in range(count):
            place = (
                MARGIN + index % columns * (24 + MARGIN),
                MARGIN + index // columns * (16 + MARGIN),
            )
            assert sheet.getpixel(place) == (10 * index, 20, 30)
    with Image.open(paths[2]) as single:
        assert single.text == {"image": "1"} and single.size == (24, 16)


def test_one_image_is_its_own_sheet() -> None:
    image = flat(1)
    assert contact_sheet([image]) is image


@pytest.mark.parametrize(
    "name, reason",
    [
        ("out.jpg", "does not end in .png.*use .*out.png"),
        ("out", "does not end in .png"),
        ("folder", "is a folder; use .*folder/out.png"),
        ("folder.png", "is a folder"),
        ("missing/out.png", "no folder .*missing for out.png"),
        ("file/out.png", "no folder"),
    ],
)
def test_a_bad_place_is_refused_before_the_work(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=reason) as error:
        check_images(tmp_path / name, 1)
    assert "\n" not in str(error.value)


def test_a_folder_in_the_place_of_a_single_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out-002.png").mkdir()
    check_images(tmp_path / "out.png", 2)
    with pytest.raises(UserError, match="out-002.png is a folder"):
        check_images(tmp_path / "out.png", 3)
    assert os.listdir(tmp_path) == ["out-002.png"]


def test_an_unwritable_folder_is_refused_before_the_work() -> None:
    for check in (
        lambda: check_file(Path("/proc/out.png")),
        lambda: make_folder(Path("/proc/previews")),
    ):
        with pytest.raises(UserError, match="cannot (write|make)") as error:
            check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_the_old_image(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out.png"
    write_png(out, flat(1), {})
    old = out.read_bytes()

    def fail(file: object) -> None:
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        write_file(out, fail)
    assert out.read_bytes() == old and os.listdir(tmp_path) == ["out.png"]


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        make_folder(tmp_path / "file")
