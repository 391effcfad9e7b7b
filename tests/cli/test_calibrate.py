"""The calibrate verb, and export with the map it wrote: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from ssd_export.cli.main import main
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.families import PUBLISHED, janus
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.policy.head_map import HeadMap
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

pytestmark = pytest.mark.slow

TINY = TinyJanus(num_layers=2, num_heads=2, num_kv_heads=2, codebook_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_transformers_checkpoint(folder / "tiny", TINY)
    (folder / "prompts.txt").write_text(
        "a red circle\n\n  two green triangles \n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Path:
    """The folder with head_map.json, head_map.png, ... in it, and stdout in out.txt."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.raises(SystemExit) as exit_, contextlib.redirect_stdout(out):
        main(
            [
                "calibrate",
                "--model",
                str(folder / "tiny"),
                "--prompts",
                str(folder / "prompts.txt"),
                "--num-images",
                "2",
                "--semantic-share",
                "0.5",
                "--out",
                str(folder / "head_map.json"),
                "--plot",
                str(folder / "head_map.png"),
                "--compare",
                str(write_other(folder / "other.json")),
            ]
        )
    assert exit_.value.code == 0
    (folder / "out.txt").write_text(out.getvalue())
    return folder


def write_other(path: Path, num_layers: int = 2) -> Path:
    HeadMap(
        janus.NAME,
        janus.GRID,
        num_layers,
        2,
        2,
        64,
        metric=((0.1, 0.9),) * num_layers,
        threshold=0.2,
    ).save(path)
    return path


def failure(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert exit_.value.code == 1 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_writes_the_map_the_plots_and_a_summary(calibrated: Path) -> None:
    head_map = HeadMap.load(calibrated / "head_map.json")
    assert head_map.semantic_share == 0.5 and head_map.costs
    out = (calibrated / "out.txt").read_text()
    for part in (
        "2 of 4 heads semantic (0.500)",
        "stability: rank correlation",
        "of 4 heads",
        "budget 0.1: predicted error",
        "streaming-llm",
        "2 images in",
        "costs by ablation",
    ):
        assert part in out
    for name in ("head_map.png", "head_map-attention.png", "head_map-columns.png"):
        with Image.open(calibrated / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50
    assert not (calibrated / "head_map.json.partial").exists()


def test_costs_are_estimated_where_that_is_asked_for(
    calibrated: Path, run: Callable[..., SimpleNamespace]
) -> None:
    done = run(
        "calibrate",
        "--model",
        calibrated / "tiny",
        "--num-images",
        1,
        "--costs",
        "fisher",
        "--out",
        "fisher.json",
    )
    assert done.code == 0 and "costs by fisher" in done.out
    tried, estimated = HeadMap.load(calibrated / "head_map.json"), HeadMap.load(Path("fisher.json"))
    assert (tried.statistics["costs"], estimated.statistics["costs"]) == ("ablation", "fisher")
    assert estimated.costs and estimated.costs != tried.costs


def test_export_allocates_from_the_map_for_any_budget(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(calibrated)
    for budget, groups, policy in (("0.2", "3", []), ("0.1", "1", ["--policy", "ssd-auto"])):
        with pytest.raises(SystemExit) as exit_:
            main(
                [
                    "export",
                    "--model",
                    "tiny",
                    "--head-map",
                    "head_map.json",
                    "--budget",
                    budget,
                    "--groups",
                    groups,
                    "--out",
                    f"b{budget}",
                    *policy,
                ]
            )
        captured = capsys.readouterr()
        assert exit_.value.code == 0 and captured.out == f"b{budget}\n"
        table = json.loads((calibrated / f"b{budget}" / "ssd_config.json").read_text())["policy"]
        assert table["name"] == "ssd-auto" and all(
            len(layer) <= int(groups) for layer in table["layers"]
        )
        slots = [
            (group["num_slots"] - 64) * group["num_heads"]
            for layer in table["layers"]
            for group in layer
        ]
        assert sum(slots) / 4 <= float(budget) * 576
        assert (
            "layer 1  " in captured.err
            and "predicted error at" in captured.err
            and "h2o" in captured.err
        )


def test_without_costs_export_falls_back_and_says_what_is_missing(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(calibrated)
    assert "run `ssd-export calibrate`" in failure(
        capsys, "export", "--model", "tiny", "--out", "b"
    )
    other = write_other(calibrated / "bare.json")
    for policy in ([], ["--policy", "ssd-row"]):
        with pytest.raises(SystemExit) as exit_:
            main(
                [
                    "export",
                    "--model",
                    "tiny",
                    "--head-map",
                    str(other),
                    "--out",
                    "bare",
                    "--force",
                    *policy,
                ]
            )
        assert exit_.value.code == 0
        assert (
            json.loads((calibrated / "bare" / "ssd_config.json").read_text())["policy"]["name"]
            == "ssd-row"
        )
        capsys.readouterr()
    assert "calibrate" in failure(
        capsys,
        "export",
        "--model",
        "tiny",
        "--head-map",
        other,
        "--policy",
        "ssd-auto",
        "--out",
        "b",
    )


@pytest.mark.parametrize(
    "args, fix",
    [
        (
            ["--policy", "ssd-auto", "--evict-every", "6"],
            "ssd-auto takes no evict_every; drop --evict-every",
        ),
        (["--budget", "0.01"], "use budget >= 0.0556"),
    ],
)
def test_what_ssd_auto_refuses(
    calibrated: Path, capsys: pytest.CaptureFixture[str], args: list[str], fix: str
) -> None:
    err = failure(
        capsys,
        "export",
        "--model",
        calibrated / "tiny",
        "--head-map",
        calibrated / "head_map.json",
        "--out",
        calibrated / "b",
        *args,
    )
    assert fix in err


@pytest.mark.parametrize(
    "damage, fix",
    [
        ({"num_layers": 3}, "metric has 2 rows"),
        ({"metric": [[0.1, float("nan")]] * 2}, "not JSON"),
        ({"costs": [[[0.1] * 27] * 2] * 3}, "costs of 3 layers"),
        ({"model_fingerprint": "ab" * 32}, "another model of the same shape"),
        ({"hidden_size": 128}, "another model: hidden_size 128, the model has 64"),
    ],
)
def test_maps_that_will_not_do(
    calibrated: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: dict, fix: str
) -> None:
    values = {**json.loads((calibrated / "head_map.json").read_text()), **damage}
    (tmp_path / "map.json").write_text(json.dumps(values))
    err = failure(
        capsys,
        "export",
        "--model",
        calibrated / "tiny",
        "--head-map",
        tmp_path / "map.json",
        "--out",
        tmp_path / "b",
    )
    assert fix in err and "calibrate" in err


BAD_VALUES = [
    (["--num-images", "0"], "use 16"),
    (["--tau", "1.5"], "use 0.2"),
    (["--tau", "nan"], "use 0.2"),
    (["--tau", "0.3", "--semantic-share", "0.5"], "give one of them"),
    (["--semantic-share", "-0.1"], "use 0.5"),
    (["--seed", "-1"], "use a number such as 0"),
    (["--prompt-slots", "0"], "use 64"),
    (["--neighborhood", "3d:1"], "use 1d:48"),
    (["--out", "."], "is a folder"),
    (["--out", "no/such/map.json"], "no folder no/such"),
    (["--plot", "map.jpg"], "use map.png"),
    (["--model", "nowhere"], "no checkpoint at nowhere"),
    (["--prompts", "nowhere.txt"], "give --prompts an existing text file"),
]


@pytest.mark.parametrize("args, fix", BAD_VALUES, ids=[" ".join(args) for args, _ in BAD_VALUES])
def test_a_bad_value_is_one_line_with_the_fix(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    fix: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in args else ["--model", folder / "tiny"]
    assert fix in failure(capsys, "calibrate", *model, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, fix",
    [
        (b"", "holds no prompt"),
        (b"\n  \n", "holds no prompt"),
        (b"caf\xe9\n", "not UTF-8 (byte 3)"),
        ("a red circle " * 30, "shorten it"),
        (b"draw <begin_of_image>\n", None),
    ],
)
def test_prompts_files_that_will_not_do(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: bytes | str,
    fix: str | None,
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if fix is None:  # control tokens in a prompt are spelled out as text
        from ssd_export.calibrate.prompts import read_prompts

        assert read_prompts(path) == ("draw <begin_of_image>",)
        return
    assert fix in failure(
        capsys,
        "calibrate",
        "--model",
        folder / "tiny",
        "--prompts",
        path,
        "--out",
        tmp_path / "m.json",
    )


def test_compare_wants_a_map_of_the_same_shape(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for other in ("janus-pro-1b", write_other(tmp_path / "other.json", num_layers=5)):
        err = failure(
            capsys,
            "calibrate",
            "--model",
            folder / "tiny",
            "--compare",
            other,
            "--out",
            tmp_path / "m.json",
        )
        assert "compare with a map of the same model" in err


def test_default_prompts_of_the_demo_are_training_captions() -> None:
    from ssd_export.calibrate.prompts import VARIED
    from ssd_export.cli.calibrate import CalibrateSpec, _prompts
    from ssd_export.demo.captions import parse_caption
    from ssd_export.demo.scenes import is_held_out

    asked = dict.fromkeys(field.name for field in fields(CalibrateSpec))
    spec = CalibrateSpec(**{**asked, "seed": 0})
    prompts = _prompts(spec, open_checkpoint(DEMO_CHECKPOINT).config)
    assert len(prompts) == 64 and not any(map(is_held_out, prompts))
    assert {parse_caption(prompt).count for prompt in prompts} >= {1, 2}
    assert _prompts(spec, PUBLISHED["janus-pro-1b"]) == VARIED
    classes = _prompts(spec, PUBLISHED["llamagen-c2i-b-256"])
    assert len(classes) == len(VARIED) and all(0 <= int(name) < 1000 for name in classes)
    with pytest.raises(UserError, match="give --prompt-embeds FILE"):
        _prompts(spec, PUBLISHED["llamagen-t2i-xl-256"])


def test_online_types_are_printed_kept_and_exported(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = calibrated, calibrated / "online.json"
    arguments = ["--model", str(folder / "tiny"), "--prompts", str(folder / "prompts.txt")]
    compare = ["--num-images", "2", "--semantic-share", "0.5", "--compare"]
    with pytest.raises(SystemExit) as exit_:
        main(
            ["calibrate", *arguments, "--online", *compare, str(folder / "head_map.json")]
            + ["--out", str(out)]
        )
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and "2 of 4 heads semantic (0.500)" in printed
    kept = HeadMap.load(out).statistics
    share = kept["agreement_with_offline"]["same_type"]
    assert f"head_map.json: the same type for {share:.1%} of 4 heads" in printed
    images = kept["agreement_of_images"]
    assert f"between 2 images: the same type for {images['mean']:.1%}" in printed
    with pytest.raises(SystemExit) as exit_:
        main(
            ["export", "--model", str(folder / "tiny"), "--head-map", str(out)]
            + ["--policy", "headkv", "--budget", "0.2", "--out", str(folder / "online-bundle")]
        )
    assert exit_.value.code == 0


@pytest.mark.parametrize(("given", "value"), [("--costs", "fisher"), ("--plot", "map.png")])
def test_online_refuses_what_it_does_not_measure(
    given: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate", "--online", given, value])
    assert exit_.value.code == 1 and f"drop {given}" in capsys.readouterr().err
