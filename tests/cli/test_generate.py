"""generate on disk: what is done stays, what cannot be written is refused first, and what is
said.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ssd_export.cli.progress import ProgressReport
from ssd_export.runtime.ort_runner import OrtRunner
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

Run = Callable[..., SimpleNamespace]
TINY = TinyJanus(seed=3, num_kv_heads=2)


@pytest.fixture
def path() -> Path:
    return bundle(checkpoint(TINY), "h2o", 0.2)


def images(folder: Path = Path()) -> list[str]:
    return sorted(file.name for file in folder.glob("*.png"))


def fail_after(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding the next image after `count` raises the error."""
    decode, done = OrtRunner.decode_image, []

    def failing(runner: OrtRunner, tokens: np.ndarray) -> np.ndarray:
        if len(done) == count:
            raise error
        done.append(1)
        return decode(runner, tokens)

    monkeypatch.setattr(OrtRunner, "decode_image", failing)


@pytest.mark.parametrize(
    "error, code",
    [
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
        (OSError(28, "No space left on device"), 1),
    ],
    ids=["ctrl-c", "sigterm", "disk"],
)
def test_images_that_are_done_stay(
    run: Run, path: Path, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(3, error, monkeypatch)
    done = run(
        *("generate", "a", "b", "--num-images", 2, "--batch", 2, "--bundle", path),
        *("--save-tokens", "t.npy", "--threads", 1),
    )
    assert done.code == code
    assert images() == ["out-000.png", "out-001.png", "out-002.png"]
    assert "3 of 4 images done: out-000.png .. out-002.png" in done.err
    with Image.open("out-002.png") as image:
        assert image.text["prompt"] == "b" and image.text["image"] == "2"
    assert np.load("t.npy").shape == (2, 576), "tokens of the batch that is done"


def test_nothing_done_says_nothing_of_it(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(0, KeyboardInterrupt(), monkeypatch)
    done = run("generate", "a", "--bundle", path)
    assert done.code == 130 and "done:" not in done.err and images() == []


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "红" * 83 + ".png", "é" * 125 + ".png"])
def test_a_long_legal_name_is_written(run: Run, path: Path, name: str) -> None:
    assert 250 <= len(os.fsencode(name)) <= 255
    done = run("generate", "x", "--bundle", path, "--out", name)
    assert done.code == 0, done.err
    assert images() == [name]


@pytest.mark.parametrize("name, count", [("a" * 252 + ".png", 1), ("a" * 250 + ".png", 2)])
def test_a_name_that_is_too_long_is_refused_first(
    run: Run, path: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several images the single ones have longer names than the sheet."""
    fail_after(0, AssertionError("it was generated"), monkeypatch)
    done = run("generate", "x", "--bundle", path, "--out", name, "--num-images", count)
    assert done.code == 1 and "use shorter names" in done.err and done.err.count("\n") == 1
    assert os.listdir() == []


def test_out_follows_a_link(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink("real/image.png", "out.png")
    done = run("generate", "x", "--bundle", path)
    assert done.code == 0, done.err
    assert os.path.islink("out.png") and images(Path("real")) == ["image.png"]
    os.symlink("nowhere/image.png", "dangling.png")
    done = run("generate", "x", "--bundle", path, "--out", "dangling.png")
    assert done.code == 1 and "no folder" in done.err and "nowhere" in done.err
    os.symlink("circle.png", "circle.png")
    done = run("generate", "x", "--bundle", path, "--out", "circle.png")
    assert done.code == 1 and "circle" in done.err


def test_a_pipe_is_no_place_for_an_image(run: Run, path: Path) -> None:
    os.mkfifo("out.png")
    done = run("generate", "x", "--bundle", path)
    assert done.code == 1 and "a named pipe" in done.err


def test_preview_frames_of_two_runs_are_not_mixed(run: Run, path: Path) -> None:
    preview = Path("p")
    preview.mkdir()
    for name in ("row-00.png", "row-47.png", "row-123.png", "row-x.png", "mine.png"):
        (preview / name).write_bytes(b"old")
    done = run("generate", "x", "--bundle", path, "--preview", "p")
    assert done.code == 0, done.err
    frames = [f"row-{row:02d}.png" for row in range(24)]
    assert images(preview) == sorted(["mine.png", "row-x.png", *frames])
    assert (preview / "row-00.png").read_bytes()[:4] == b"\x89PNG"


def test_old_frames_stay_until_there_is_a_new_one(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p").mkdir()
    Path("p/row-47.png").write_bytes(b"old")
    fail_after(0, KeyboardInterrupt(), monkeypatch)
    assert run("generate", "x", "--bundle", path, "--preview", "p").code == 130
    assert images(Path("p")) == ["row-47.png"]


class Unwritable(io.StringIO):
    """A stream whose reader is gone."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error
        self.tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise self._error


BROKEN = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), ValueError("closed file")]


@pytest.mark.parametrize("error", BROKEN, ids=["pipe", "disk", "closed"])
def test_progress_that_cannot_be_written_ends_nothing(error: Exception) -> None:
    stream = Unwritable(error)
    with ProgressReport(stream, clock=iter(range(0, 1000, 100)).__next__) as progress:
        progress("stage", 0, 1)
        progress("stage", 1, 2)
        progress("other", 2, 2)
    assert stream.tried, "nothing was written"


def test_generate_goes_on_without_a_stderr(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Unwritable(BROKEN[0]))
    assert run("generate", "x", "--bundle", path).code == 0
    assert images() == ["out.png"]


def test_it_says_what_it_does_from_the_beginning(run: Run, path: Path) -> None:
    done = run("generate", "x", "y", "--bundle", path, "--threads", 2)
    lines = done.err.splitlines()
    assert lines[0].startswith(f"bundle {path}: ") and lines[0].endswith(
        "policy h2o, budget 0.2, float32"
    )
    assert lines[1] == "runner ort (ONNX Runtime) on cpu"
    stages = [line.partition(":")[0] for line in lines[2:]]
    assert stages == [
        "checking the bundle",
        "opening the weights ...",
        "opening the weights",
        "2 threads of the CPU",
        "reading the prompts ...",
        "reading the prompts",
        "generating 2 images",
    ]


def test_other_models_have_no_little_language(run: Run, path: Path) -> None:
    assert "little language" not in run("generate", "a dog", "--bundle", path).err
