"""Record of what an export has finished, kept in its unfinished folder, so that `--resume` goes on
instead of beginning anew.

    <bundle>.partial-export/
        journal.jsonl   line 1: {what was asked for}; then one line a tensor: {"name", "end",
        "sha256"} onnx/weights.safetensors, ...

`end` is where the tensor ends in the weights file, `sha256` that of the file up to there. Before
anything is added, the file is read again up to the last line that still holds, so a tensor that
never reached the disk is written once more. One export at a time holds the journal's lock (POSIX).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ssd_export.bundle import JOURNAL
from ssd_export.errors import UserError
from ssd_export.locks import try_lock
from ssd_export.typed_json import shown

BLOCK_BYTES = 4 << 20


def unfinished_folder(out: Path) -> Path:
    """The folder that an export to `out` writes until it is complete."""
    out = out.resolve()
    return out.with_name(f"{out.name}.partial-export")


class Journal:
    """The journal of one unfinished export; a context manager that holds its lock."""

    def __init__(self, folder: Path, asked: dict[str, Any], resume: bool) -> None:
        """Opens the journal of `folder`, begun anew unless `resume`, or where there is nothing to
        resume.

        Args: asked: everything that decides what the bundle will be, JSON by name.
        Raises: UserError where another export is writing there, or the folder was begun with
        something else asked.
        """
        self.path = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._lock()
        lines = self._read() if resume else []
        if lines:
            _check_same(lines[0], json.loads(json.dumps(asked)), folder)
        self.finished: list[dict[str, Any]] = lines[1:]
        self.is_resumed = bool(lines)
        if not lines:
            self._begin(folder, asked)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def let_go(self) -> None:
        """Closes the file before the folder gets its name: Windows renames no folder with an open
        file; elsewhere the lock stays.
        """
        if os.name == "nt":
            self._file.close()

    def open_weights(
        self, path: Path, header: bytes, ends: Sequence[int]
    ) -> tuple[WeightsStream, int]:
        """The weights file, ready for its next tensor, and how many tensors it holds already.

        Args: ends: where each planned tensor ends in the file.
        """
        # the caller closes it
        file = path.open("r+b" if path.exists() else "w+b")
        digest, count = hashlib.sha256(), 0
        if (
            self._hash_up_to(file, digest, len(header))
            and digest.digest() == hashlib.sha256(header).digest()
        ):
            count, digest = self._intact(file, digest, ends)
        else:
            digest = hashlib.sha256(header)
            file.seek(0)
            file.write(header)
        file.seek(ends[count - 1] if count else len(header))
        file.truncate()
        self._rewrite(count)
        return WeightsStream(file, digest), count

    def note(self, name: str, end: int, sha256: str) -> None:
        """A tensor is finished."""
        self._append({"name": name, "end": end, "sha256": sha256})

    def _intact(self, file: BinaryIO, digest: Any, ends: Sequence[int]) -> tuple[int, Any]:
        """Number of the journal's tensors that the file holds as they were written, and the hash up
        to there.
        """
        good = digest.copy()
        for count, (line, end) in enumerate(zip(self.finished, ends)):
            if line.get("end") != end or not self._hash_up_to(file, digest, end):
                return count, good
            if digest.hexdigest() != line.get("sha256"):
                return count, good
            good = digest.copy()
        return min(len(self.finished), len(ends)), good

    def _hash_up_to(self, file: BinaryIO, digest: Any, end: int) -> bool:
        """Adds the file from where it stands to `end`; False where it is shorter."""
        while left := end - file.tell():
            block = file.read(min(left, BLOCK_BYTES))
            if not block:
                return False
            digest.update(block)
        return True

    def _begin(self, folder: Path, asked: dict[str, Any]) -> None:
        for entry in folder.iterdir():
            if entry != self.path:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._file.truncate(0)
        self._append(asked)

    def _rewrite(self, count: int) -> None:
        """Forgets the lines of tensors that did not hold."""
        if count == len(self.finished):
            return
        self._file.seek(0)
        first = self._file.readline()
        kept = b"".join(_line(entry) for entry in self.finished[:count])
        self._file.truncate(0)
        self._file.write(first + kept)
        self._file.flush()
        self.finished = self.finished[:count]

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(_line(entry))
        self._file.flush()

    def _read(self) -> list[dict[str, Any]]:
        """Its lines, up to one that an interruption cut; none where there is nothing to go on
        from.
        """
        self._file.seek(0)
        lines, end = [], 0
        for text in self._file:
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break
            lines.append(line)
            end += len(text)
        self._file.truncate(end)
        return lines

    def _lock(self) -> None:
        """Keeps a second export out, where the file system has locks."""
        if try_lock(self._file.fileno()) is False:
            self._file.close()
            raise UserError(
                f"another export is writing {self.path.parent}; wait for it, or choose another"
                " folder with --out"
            )


class WeightsStream:
    """Writes the weights file and keeps the sha256 of all that is in it."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def __enter__(self) -> WeightsStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: memoryview | bytes) -> None:
        """Appends to the file and to the running hash."""
        self._file.write(data)
        self._digest.update(data)

    def finished(self) -> tuple[int, str]:
        """(where the file ends, its sha256), once everything written has left this process."""
        self._file.flush()
        return self._file.tell(), self._digest.hexdigest()


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _check_same(begun: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raises UserError that names what differs between the export that was begun and the one asked
    for.
    """
    differing = [name for name in {**begun, **asked} if begun.get(name) != asked.get(name)]
    if not differing:
        return
    name = differing[0]
    what = (
        "from another checkpoint"
        if name == "checkpoint"
        else f"with {name.replace('_', '-') if name in asked else shown(name)}"
        f" {shown(begun.get(name))}, and now it is {shown(asked.get(name))}"
    )
    raise UserError(
        f"{folder} was begun {what}: resume with the same model and options, or leave out --resume"
        " to begin anew"
    )
