"""--weights, --kv-dtype and --target on the command line: what is refused, what is said, what a
bundle then shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ssd_export.cli.main import ssd_export
from ssd_export.errors import UserError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(ssd_export, arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "--weights", "int3"],
            "unknown --weights 'int3'; choose one of none, int8, int4, fp8",
        ),
        (
            ["export", "--kv-dtype", "fp8"],
            "--kv-dtype fp8 is not offered: no ONNX operator that runtimes have writes a row",
        ),
        (
            ["eval", "--kv-dtype", "fp8"],
            "use --kv-dtype int8, as many bytes and a quarter of the error",
        ),
        (
            ["export", "--weights", "fp8"],
            "needs a target with fp8 (most machines have none); use --target ada, ",
        ),
        (
            ["export", "--weights", "fp8", "--target", "rtx"],
            "(rtx is not one); use --target ada, blackwell, ",
        ),
        (
            ["export", "--weights", "fp8", "--target", "cpu"],
            "or --weights int8 or int4, which run everywhere",
        ),
        (
            ["export", "--head-weights", "int3"],
            "unknown --head-weights 'int3'; choose one of none, int8, int4, fp8",
        ),
        (
            ["export", "--head-weights", "fp8"],
            "--head-weights fp8 needs a target with fp8 (most machines have none); use --target",
        ),
        (["eval", "--head-weights", "fp8"], "unknown --head-weights 'fp8'; choose one of none"),
        (["export", "--target", "moon"], "unknown --target 'moon'; choose one of a100, ada, "),
        (["eval", "--weights", "int3"], "unknown --weights 'int3'; choose one of none, int8, int4"),
        (["eval", "--kv-dtype", "int3"], "unknown --kv-dtype 'int3'; choose one of model, int8"),
    ],
)
def test_bad_precision_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    assert message in str(error) and "\n" not in str(error)


def test_a_bundle_shows_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "bundle"
    exported = run(
        "export",
        "--weights",
        "int4",
        "--kv-dtype",
        "int8",
        "--target",
        "jetson-orin",
        "--out",
        str(out),
    )
    assert exported.exception is None
    assert (
        "int4 in blocks of 32, because 128 does not divide their inputs: down (6 layers)"
        in exported.stderr
    )
    shown = run("inspect", str(out)).stdout
    assert "the layers' matrices in int4, blocks of 128 inputs" in shown
    assert "the generation head's matrices in int8, a scale for every output channel" in shown
    assert "6 of them in blocks of 32" in shown and "keys and values of the cache in int8" in shown
    facts = json.loads(run("inspect", str(out), "--json").stdout)
    assert (facts["precision"]["weights"], facts["precision"]["head"]) == ("int4", "int8")
    assert facts["policy"]["kv_dtype"] == "int8"
    assert json.loads((out / "ssd_config.json").read_text())["target"] == "jetson-orin"


def test_fp8_is_exported_for_a_target_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "bundle"
    assert (
        run("export", "--weights", "fp8", "--target", "hopper", "--out", str(out)).exception is None
    )
    assert json.loads((out / "ssd_config.json").read_text())["precision"]["weights"] == "fp8"
