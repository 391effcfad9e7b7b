"""An export that replaces a bundle says which engines go with it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.export.exporter import export_bundle
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import checkpoint, export_spec

BUILD = "rtx1.7-sm90-linux-x86_64"


def test_engines_that_go_with_a_replaced_bundle_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = export_spec(checkpoint(TinyJanus()), "h2o", out=tmp_path / "b", force=True)
    with caplog.at_level(logging.WARNING):
        bundle = open_bundle(export_bundle(spec))
        assert "engines" not in caplog.text
        bundle.add_files({f"engines/{BUILD}/engine.json": b"{}"})
        export_bundle(spec)
    assert f"its engines ({BUILD})" in caplog.text
    assert f"build-engine --bundle {bundle.path}" in caplog.text
    assert not (bundle.path / "engines").exists()
