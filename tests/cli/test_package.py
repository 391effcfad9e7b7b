"""package: what it writes and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint


def test_both_packages_in_one_command(run: Callable[..., SimpleNamespace]) -> None:
    path = bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)
    command = ("package", "--bundle", path, "--triton", "models", "--docker", "image")
    done = run(*command, "--name", "tiny", "--max-batch", 3)
    assert done.code == 0, done.err
    assert done.out == "models/tiny\nimage\n"
    assert "max_batch_size: 3" in Path("models/tiny/config.pbtxt").read_text()
    assert '"--max-batch", "3"' in Path("image/Dockerfile").read_text()
    for copied in ("models/tiny/1/bundle", "image/bundle"):
        assert (
            Path(copied, "ssd_config.json").read_bytes() == (path / "ssd_config.json").read_bytes()
        )
    done = run(*command, "--name", "tiny")
    assert done.code == 1 and "models/tiny exists" in done.err
    assert run(*command, "--name", "tiny", "--force").code == 0


def test_what_is_to_be_written_must_be_said(run: Callable[..., SimpleNamespace]) -> None:
    assert run("package").code == 2
    done = run("package", "--docker", "d", "--runner", "none")
    assert done.code == 1 and "unknown runner" in done.err
