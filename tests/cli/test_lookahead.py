"""`generate --lookahead`: what is refused, and what is said of what is not lossless."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ssd_export.cli.main import main
from ssd_export.cli.options import lookahead_of, lossless_lookahead_of
from ssd_export.errors import UserError
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint


@pytest.mark.parametrize(
    ("text", "tokens"), [("off", 1), ("auto", "auto"), ("2", 2), ("64", 64), ("zipar:8", "zipar:8")]
)
def test_off_or_a_number_of_tokens(text: str, tokens: int | str) -> None:
    assert lookahead_of(text) == tokens


@pytest.mark.parametrize("text", ["1", "0", "-4", "65", "Auto", "", "１６", "1e1", "9" * 5000])
def test_anything_else_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(UserError, match="use auto") as error:
        lookahead_of(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


def test_what_serves_many_takes_the_lossless_modes_alone() -> None:
    assert lossless_lookahead_of("auto") == "auto" and lossless_lookahead_of("8") == 8
    with pytest.raises(UserError, match="zipar:8 is not lossless"):
        lossless_lookahead_of("zipar:8")


def test_zipar_is_named_in_the_result_and_in_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle(checkpoint(TinyJanus(seed=5, num_layers=2)), "full")
    out = tmp_path / "image.png"
    asked = ["generate", "a red circle", "--bundle", str(path), "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        main([*asked, "--lookahead", "zipar:4"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and "zipar:4: not lossless" in printed
    assert Image.open(out).text["lookahead"] == "zipar:4"
    with pytest.raises(SystemExit):
        main([*asked, "--lookahead", "off"])
    assert "lossless" not in capsys.readouterr().out
    assert "lookahead" not in Image.open(out).text


def test_zipar_needs_a_number_and_a_bundle_that_keeps_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="use zipar:12"):
        lookahead_of("zipar:x")
    path = bundle(checkpoint(TinyJanus(seed=5, num_layers=2)), "h2o")
    with pytest.raises(SystemExit) as exit_:
        main(
            ["generate", "a red circle", "--bundle", str(path), "--lookahead", "zipar:4"]
            + ["--out", str(tmp_path / "image.png")]
        )
    assert exit_.value.code == 1
    assert "--policy full, or use --lookahead auto" in capsys.readouterr().err
