"""The results.jsonl of a run: one line for each image that was made or failed, appended as it
happens, so that the next run knows what is left.

The last line of an image counts. A line that was cut off by the end of a process is dropped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ssd_export.errors import UserError
from ssd_export.files import make_folder, write_file
from ssd_export.locks import try_lock
from ssd_export.os_errors import os_error
from ssd_export.prompt_files.tasks import ImageTask
from ssd_export.typed_json import parse_json
from ssd_export.version import TOOL_VERSION

NAME = "results.jsonl"
MAX_BYTES = 4 << 30  # of results: a million images take less than a gigabyte
WAY_OUT = "choose another --out, or remove that line"


@dataclass(frozen=True)
class Result:
    """An image of a file of prompts.

    file: in the folder of the results, None where it failed; error: why, else None. seed_image: the
    number that image has under its seed.
    """

    line: int
    image: int
    file: str | None
    error: str | None
    prompt: str
    negative_prompt: str
    seed: int
    seed_image: int
    cfg_scale: float
    temperature: float
    top_k: int
    bundle_hash: str
    tool_version: str = TOOL_VERSION

    @classmethod
    def of(cls, task: ImageTask, bundle_hash: str, error: str | None = None) -> Result:
        """The result of an image, done where there is no error."""
        request = task.request
        return cls(
            task.line,
            task.image,
            None if error else task.file_name,
            error,
            task.prompt,
            request.negative_prompt,
            *request.image,
            **asdict(request.sampling),
            bundle_hash=bundle_hash,
        )

    def texts(self) -> dict[str, str]:
        """Text chunks to write into the image."""
        left_out = ("file", "error")
        return {k: str(v) for k, v in asdict(self).items() if k not in left_out and v != ""}


class Results:
    """The results in a folder, for one process at a time. A context manager."""

    def __init__(self, folder: Path, bundle_hash: str) -> None:
        """Reads what is there. Raises: UserError where another process has it open, it cannot be
        read or written, or its images are of another bundle.
        """
        make_folder(folder)
        self._folder, self.bundle_hash = folder, bundle_hash
        self._path = folder / NAME
        try:
            self._file: BinaryIO = self._path.open("a+b")
        except OSError as error:
            raise os_error(error, "write", self._path) from error
        try:
            if try_lock(self._file.fileno()) is False:
                raise UserError(f"another process writes to {self._path}; wait for it, or end it")
            self._latest = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, task: ImageTask) -> bool:
        """Whether the image is there, made from what is asked for now."""
        found = self._latest.get((task.line, task.image))
        if found is None or not (self._folder / task.file_name).is_file():
            return False
        wanted = Result.of(task, self.bundle_hash)
        return found == replace(wanted, tool_version=found.tool_version)

    def done(self, task: ImageTask, png: bytes) -> None:
        """Writes the image, then its result. Raises: UserError for a full disk."""
        write_file(self._folder / task.file_name, lambda file: file.write(png))
        self._append(Result.of(task, self.bundle_hash))

    def failed(self, task: ImageTask, error: str) -> None:
        """Writes that there is no image."""
        self._append(Result.of(task, self.bundle_hash, error))

    def _append(self, result: Result) -> None:
        line = json.dumps(asdict(result), allow_nan=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise os_error(error, "write", self._path) from error
        self._latest[result.line, result.image] = result

    def _read(self) -> dict[tuple[int, int], Result]:
        latest: dict[tuple[int, int], Result] = {}
        if os.fstat(self._file.fileno()).st_size > MAX_BYTES:
            raise UserError(f"{self._path} has more than {MAX_BYTES} bytes; choose another --out")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # cut off
            end += len(line)
            result = parse_json(line, Result, f"{self._path}, line {number}", WAY_OUT)
            if result.bundle_hash != self.bundle_hash:
                raise UserError(
                    f"{self._path}, line {number}: an image of another bundle; choose another --out"
                )
            latest[result.line, result.image] = result
        try:
            self._file.truncate(end)
        except OSError as error:
            raise os_error(error, "write", self._path) from error
        return latest
