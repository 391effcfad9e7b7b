"""The model of a Triton repository: requests of a batch become images of one batch.

A request has one row an image. Its responses are decoupled: one after each grid row that it wants
previewed, then its images, then the end. A request that cannot be generated, or whose client has
left, takes no other with it.

Source: the README of Triton's Python backend (decoupled mode, request cancellation).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.deploy.triton_repository import BUNDLE, INPUTS
from ssd_export.errors import UserError
from ssd_export.noise import ImageSeed
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.images import preview_rows
from ssd_export.runtime.prompt_batch import ImageRequest, bundle_sampling
from ssd_export.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass
class _Asked:
    """A request of Triton's: its images, its rows to preview, and how it is answered."""

    request: Any
    sender: Any
    images: list[ImageRequest] = field(default_factory=list)
    preview_rows: frozenset[int] = frozenset()
    is_over: bool = False

    def is_wanted(self) -> bool:
        """Whether somebody waits for it."""
        if not self.is_over and self.request.is_cancelled():
            self.is_over = True
        return not self.is_over


class TritonModel:
    """The model that Triton calls. backend: its module triton_python_backend_utils, set by
    model.py.
    """

    backend: Any = None

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle. Raises: TritonModelException for what cannot be opened."""
        config = json.loads(args["model_config"])
        values = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        threads = values.get("threads")
        try:
            self._generator = ImageGenerator.from_bundle(
                folder, values["runner"], values["provider"], int(threads) if threads else None
            )
        except UserError as error:
            raise self.backend.TritonModelException(str(error)) from error
        self._defaults = bundle_sampling(self._generator.bundle)

    def execute(self, requests: Sequence[Any]) -> None:
        """Generates the images of all requests, in batches that the runner takes."""
        asked = [_Asked(request, request.get_response_sender()) for request in requests]
        for one in asked:
            try:
                self._read(one)
            except UserError as error:
                self._fail(one, str(error))
        most, batch = self._generator.runner.max_images, list[_Asked]()
        for one in asked:
            if batch and sum(len(other.images) for other in [*batch, one]) > most:
                self._generate(batch)
                batch = []
            if not one.is_over:
                batch.append(one)
        if batch:
            self._generate(batch)

    def finalize(self) -> None:
        """Frees the weights."""
        self._generator.close()

    def _read(self, one: _Asked) -> None:
        """Fills in what is asked for. Raises: UserError for what cannot be generated."""
        columns = {name: self._column(one.request, name) for name in INPUTS}
        count = len(columns["prompt"] or [])
        for number in range(count):
            row = {name: column[number] for name, column in columns.items() if column}
            sampling = self._sampling(row)
            seed = ImageSeed(int(row.get("seed", 0)), 0)
            negative = row.get("negative_prompt", "")
            one.images.append(ImageRequest(row["prompt"], sampling, seed, negative))
        self._generator.check_requests(one.images)
        most = self._generator.runner.max_images
        if count > most:
            raise UserError(f"{count} images in a request, and {most} fit; send fewer at once")
        rows = self._generator.config.grid.height
        previews = max(map(int, columns["previews"] or [0]))
        one.preview_rows = frozenset(preview_rows(max(0, previews), rows))

    def _sampling(self, row: dict[str, Any]) -> Sampling:
        numbers = (row.get(name) for name in ("cfg_scale", "temperature", "top_k"))
        return self._defaults.changed(*numbers)

    def _column(self, request: Any, name: str) -> list[Any] | None:
        """The values of an input, one an image; None where it was left out."""
        tensor = self.backend.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        values = tensor.as_numpy().reshape(-1).tolist()
        if INPUTS[name] != "TYPE_STRING":
            return values
        try:
            return [value.decode() if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError:
            raise UserError(f"{name} is not UTF-8; send it in UTF-8") from None

    def _generate(self, batch: Sequence[_Asked]) -> None:
        places = [one for one in batch for _ in one.images]
        last = self._generator.config.grid.height - 1

        def wants_preview(place: int, row: int) -> bool:
            return row in places[place].preview_rows and places[place].is_wanted()

        rows = self._generator.stream_requests(
            [image for one in batch for image in one.images], wants_preview
        )
        try:
            for event in rows:
                for one in batch:
                    mine = [place for place, owner in enumerate(places) if owner is one]
                    if mine[0] in event.images and one.is_wanted():
                        images = [event.images[place] for place in mine]
                        self._send(one, images, event.row, is_last=event.row == last)
                if not any(one.is_wanted() for one in batch):
                    break
        except Exception as error:
            log.exception("a batch of %d images failed", len(places))
            for one in batch:
                self._fail(one, str(error) or type(error).__name__)
        finally:
            rows.close()
            for one in batch:
                self._end(one)

    def _send(self, one: _Asked, images: Sequence[Image.Image], row: int, is_last: bool) -> None:
        pixels = np.stack([np.asarray(image) for image in images])
        rows = np.full((len(images), 1), row, np.int32)
        tensor = self.backend.Tensor
        one.sender.send(
            self.backend.InferenceResponse([tensor("image", pixels), tensor("row", rows)])
        )
        if is_last:
            self._end(one)

    def _fail(self, one: _Asked, message: str) -> None:
        if not one.is_over:
            error = self.backend.TritonError(message)
            one.sender.send(self.backend.InferenceResponse([], error))
            self._end(one)

    def _end(self, one: _Asked) -> None:
        """Says once that no more responses come, of a cancelled request too."""
        if one.sender is not None:
            one.sender.send(flags=self.backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            one.sender, one.is_over = None, True
