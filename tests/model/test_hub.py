"""--model owner/name, against a hub on this machine: download, resume, the pinned commit, and one
line for what fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.synthetic_checkpoint import write_checkpoint
from ssd_export.model.hub import is_hub_id, wanted_files
from tests.forked import forked_python
from tests.model.fake_hub import COMMIT, NAME, FakeHub, serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE = "600"  # seconds for an answer of the hub: the library's 10 can pass on a busy machine


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("hub") / "repo", "small", "transformers", "fp32"
    )
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path) -> Iterator[FakeHub]:
    with serve(Path(shutil.copytree(repository, tmp_path / "repository"))) as running:
        yield running


def export(hub: FakeHub | None, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command in a separate process: the hub's address is read when its library is
    imported.
    """
    command = [
        *forked_python(),
        str(ROOT / "cli.py"),
        "export",
        "--policy",
        "h2o",
        "--out",
        str(home / "b"),
        *args,
    ]
    url = hub.url if hub else "http://127.0.0.1:9"
    env = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": PATIENCE,
        "HF_HUB_DOWNLOAD_TIMEOUT": PATIENCE,
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=home, capture_output=True, text=True, env=os.environ | env)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_a_download_is_pinned_in_the_bundle_and_the_next_one_needs_no_network(
    hub: FakeHub, tmp_path: Path
) -> None:
    done = export(hub, tmp_path, "--model", NAME)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "b" / "ssd_config.json").read_text())
    assert config["model_revision"] == COMMIT and config["model_name"] == "janus-tiny"
    assert {name.split("@")[0] for name in hub.served} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    offline = export(None, tmp_path, "--model", NAME, "--force")
    assert offline.returncode == 0, offline.stderr
    assert json.loads((tmp_path / "b" / "ssd_config.json").read_text())["model_revision"] == COMMIT


def test_a_download_that_broke_off_is_continued(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = 12 << 20  # the library writes in pieces of 10 MB
    first = export(hub, tmp_path, "--model", NAME)
    again = first if first.returncode == 0 else export(hub, tmp_path, "--model", NAME)
    assert again.returncode == 0, again.stderr
    starts = [
        int(name.split("@")[1]) for name in hub.served if name.startswith("model.safetensors")
    ]
    assert starts[0] == 0 and starts[-1] > 0, starts


def test_an_unknown_revision_or_model_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    line = error_line(export(hub, tmp_path, "--model", NAME, "--revision", "v9"))
    assert "has no revision v9; leave out --revision" in line
    assert "the hub has no model some-owner/other" in error_line(
        export(hub, tmp_path, "--model", "some-owner/other")
    )


def test_offline_says_how_to_get_the_files_by_hand(tmp_path: Path) -> None:
    line = error_line(export(None, tmp_path, "--model", NAME))
    assert f"hf download {NAME} --local-dir DIR" in line and "--model" in line


def test_a_shard_of_another_model_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "small", "transformers", "fp32", num_layers=3)
    text = json.loads((other / "config.json").read_text())
    text["text_config"]["num_hidden_layers"] = 5
    (other / "config.json").write_text(json.dumps(text))
    shutil.copy(other / "config.json", hub.folder / "config.json")
    assert "num_hidden_layers is 5, and the weights beside it have at most 4" in error_line(
        export(hub, tmp_path, "--model", NAME)
    )


def test_a_revision_of_a_local_model_is_refused(tmp_path: Path) -> None:
    assert "--revision is for models of a hub" in error_line(
        export(None, tmp_path, "--model", "demo", "--revision", "v1")
    )


def test_weights_come_in_one_format() -> None:
    both = ["a.safetensors", "a.bin", "config.json", "README.md", "sub/b.bin", "tokenizer.json"]
    assert wanted_files(both) == ["a.safetensors", "config.json", "tokenizer.json"]
    assert wanted_files(["a.bin", "config.json"]) == ["a.bin", "config.json"]
    assert (
        is_hub_id("deepseek-ai/Janus-Pro-7B")
        and not is_hub_id("../models/x")
        and not is_hub_id("a/b/c")
    )
