"""A bundle's twin with the full cache: other graphs over the same weights file, so that it costs
neither disk nor time.

The heads stay in the order of the bundle's groups; for a cache that keeps everything that makes no
difference.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from ssd_export.bundle import Bundle, open_bundle, write_bundle, write_config
from ssd_export.dtypes import DTYPES
from ssd_export.export.exporter import write_graphs
from ssd_export.export.weight_plan import plan_weights
from ssd_export.export.weights import WEIGHTS_FILE
from ssd_export.locks import scratch_folder
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.families import family_of

WEIGHTS = f"onnx/{WEIGHTS_FILE}"


@contextmanager
def full_twin(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[Bundle]:
    """The bundle with the policy full, gone when the block ends.

    Args: checkpoint: the one that the bundle was made from; no weight is read.
    """
    beside = bundle.folder.parent
    can_link = os.access(beside, os.W_OK)
    with scratch_folder(beside if can_link else Path(gettempdir()), ".full-") as folder:
        target = folder / "bundle"
        with write_bundle(target, force=False) as partial:
            _write(bundle, checkpoint, partial)
        yield open_bundle(target)


def _write(bundle: Bundle, checkpoint: Checkpoint, folder: Path) -> None:
    table = bundle.config.policy.full()
    dtype = DTYPES[bundle.config.dtype].torch
    precision = bundle.config.precision
    weights = plan_weights(checkpoint, table, dtype, precision.weights, precision.head)
    (folder / "onnx").mkdir()
    _link(bundle.file(WEIGHTS), folder / WEIGHTS)
    specs = write_graphs(
        folder / "onnx",
        checkpoint.config,
        table,
        bundle.config.dtype,
        weights,
        tensor_places(folder / WEIGHTS),
    )
    for name in ("config.json", *family_of(bundle.config.model).prompt_files):
        shutil.copyfile(bundle.file(name), folder / name)
    graphs = {spec.name: spec for spec in specs}
    write_config(folder, replace(bundle.config, policy=table, graphs=graphs))


def tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, length) in bytes of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: (
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
