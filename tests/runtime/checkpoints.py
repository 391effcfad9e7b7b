"""Bundles of small random checkpoints, made once a test session, and what transformers generates
from them.
"""

from __future__ import annotations

import atexit
import shutil
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkdtemp

from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.families import janus
from ssd_export.policy.head_map import HeadMap
from tests.janus_checkpoints import (
    TinyJanus,
    write_original_checkpoint,
    write_transformers_checkpoint,
)

PROMPTS = ("a red circle", "two green triangles beside the yellow star on white", "blue")


@lru_cache(maxsize=1)
def scratch() -> Path:
    """A folder that goes when this process ends: each process of a parallel run has its own."""
    folder = Path(mkdtemp(prefix="ssd-export-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def checkpoint(tiny: TinyJanus, layout: str = "transformers", sharded: bool = False) -> Path:
    write = {"transformers": write_transformers_checkpoint, "original": write_original_checkpoint}[
        layout
    ]
    return write(Path(mkdtemp(prefix="checkpoint-", dir=scratch())), tiny, sharded)


def export_spec(
    model: Path, policy: str = "full", budget: float = 0.2, **changes: object
) -> ExportSpec:
    values = dict(
        model=str(model),
        policy=policy,
        budget=budget,
        window=None,
        evict_every=None,
        num_recent=None,
        num_sinks=None,
        head_map=None,
        groups=3,
        prompt_slots=32,
        dtype="fp32",
        out=None,
        force=False,
    )
    return ExportSpec(**{**values, **changes})


@cache
def bundle(model: Path, policy: str = "full", budget: float = 0.2, **changes: object) -> Path:
    out = Path(mkdtemp(prefix="bundle-", dir=scratch()))
    return export_bundle(export_spec(model, policy, budget, out=out, **changes))


@cache
def head_map_file(model: Path) -> Path:
    """A head map with both kinds in every layer, written beside nothing: given by --head-map."""
    config = open_checkpoint(model).config
    metric = tuple(
        tuple(((3 * layer + 5 * head) % 7) / 7 for head in range(config.num_heads))
        for layer in range(config.num_layers)
    )
    path = scratch() / f"{model.name}-head-map.json"
    HeadMap(
        janus.NAME,
        janus.GRID,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.hidden_size,
        metric,
        0.4,
    ).save(path)
    return path
