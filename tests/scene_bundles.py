"""A random checkpoint that speaks the demo's image vocabulary, with a head map, and bundles of it
by policy.

A plugin of the whole run, so what it needs is imported by the fixtures: torch takes seconds, and
most tests do without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ssd_export.demo.codes import num_codes
    from ssd_export.model.checkpoint import open_checkpoint
    from ssd_export.model.families import janus
    from ssd_export.policy.head_map import HeadMap
    from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    write_transformers_checkpoint(
        folder, TinyJanus(codebook_size=num_codes(), channel_multipliers=(1, 1, 1))
    )
    config = open_checkpoint(folder).config
    metric = ((0.1, 0.9, 0.1, 0.8), (0.1, 0.7, 0.2, 0.3))
    HeadMap(
        janus.NAME,
        janus.GRID,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.hidden_size,
        metric,
        0.5,
    ).save(folder / "head_map.json")
    return folder


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A copy of the bundle of a policy, to be changed at will."""
    from ssd_export.export.exporter import export_bundle
    from ssd_export.export.temporary_bundle import PolicyChoice

    made: dict[tuple[str, float, str], Path] = {}

    def bundle(policy: str = "ssd-row", budget: float = 0.1, dtype: str = "fp32") -> Path:
        key = (policy, budget, dtype)
        if key not in made:
            choice = PolicyChoice(str(checkpoint), policy, budget, dtype=dtype)
            made[key] = export_bundle(choice.export_spec(tmp_path_factory.mktemp("bundle") / "b"))
        copy = tmp_path_factory.mktemp("copy") / "b"
        shutil.copytree(made[key], copy)
        return copy

    return bundle


@pytest.fixture(scope="session")
def change_config() -> Callable[[Path, Callable[[dict], None]], None]:
    """Edits ssd_config.json of a bundle, and rewrites its manifest."""

    def change(bundle: Path, edit: Callable[[dict], None]) -> None:
        path = bundle / "ssd_config.json"
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))
        rewrite_manifest(bundle)

    return change


def rewrite_manifest(bundle: Path) -> None:
    """Rewrites the manifest, as somebody would who changes a bundle on purpose or exports it with a
    fault.
    """
    from ssd_export.bundle.manifest import FileEntry, write_manifest

    names = sorted(
        p.relative_to(bundle).as_posix()
        for p in bundle.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    )
    write_manifest(bundle, {name: FileEntry.of(bundle / name) for name in names})


@pytest.fixture(scope="session")
def manifest_rewriter() -> Callable[[Path], None]:
    return rewrite_manifest
