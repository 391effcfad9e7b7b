"""What --model means, and the settings that a checkpoint brings: wrong ones are found at the
start.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from ssd_export.errors import UserError
from ssd_export.export.exporter import generation_defaults
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.families import PUBLISHED
from ssd_export.model.find import CLASS_DEMO, DEMOS, find_model
from tests.unprivileged import error_without_rights


@pytest.mark.parametrize("model", ["nowhere", "~no-such-user-here/x", "x" * 5000, "nu\0ll"])
def test_a_model_that_is_nowhere_is_one_line(model: str) -> None:
    with pytest.raises(UserError) as refused:
        find_model(model)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 6000


def test_a_folder_that_one_may_not_enter() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "locked" / "model").mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "locked").chmod(0o700)
    line = error_without_rights(lambda: find_model(str(folder / "locked" / "model")))
    assert "Permission denied; run as a user who may" in line or not line


def test_a_demo_that_is_not_installed_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEMOS, CLASS_DEMO, tmp_path / "nowhere")
    with pytest.raises(UserError, match="install ssd-export again.*train-demo --classes"):
        find_model(CLASS_DEMO)


def checkpoint_in(folder: Path) -> Checkpoint:
    """A checkpoint of which nothing but the files beside the weights is looked at."""
    return Checkpoint(folder, "transformers", PUBLISHED["janus-pro-1b"], {})


def test_the_settings_of_a_checkpoint(tmp_path: Path) -> None:
    assert generation_defaults(checkpoint_in(tmp_path)).cfg_scale == 5.0
    (tmp_path / "ssd_generation.json").write_text('{"cfg_scale": 1, "temperature": 0.9}')
    assert generation_defaults(checkpoint_in(tmp_path)).temperature == 0.9


@pytest.mark.parametrize(
    "content",
    [
        "{bad",
        "[]",
        '{"cfg_scale": "5"}',
        '{"cfg_scale": null}',
        '{"cfg_scale": NaN}',
        '{"cfg_scale": -5}',
        '{"cfg_scale": 1e39}',
        '{"temperature": -1}',
        '{"temperature": 1e999}',
        '{"temperature": true}',
        '{"cfg_scal": 3}',
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass"),
        "1" * 5000,
    ],
)
def test_wrong_settings_are_one_line_with_a_way_out(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "ssd_generation.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        generation_defaults(checkpoint_in(tmp_path))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
