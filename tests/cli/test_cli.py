"""The command line: instant help, one line for what a user can mend, exit codes, what verbs
write.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssd_export.bundle import open_bundle, write_bundle
from ssd_export.cli.main import VERBS, main
from ssd_export.cli.progress import ProgressReport
from ssd_export.errors import UserError
from ssd_export.policy.make import make_policy
from ssd_export.version import TOOL_VERSION
from tests.bundle.small_bundles import MODEL, fill, small_config

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich", "PIL")
Run = Callable[..., SimpleNamespace]


def small_bundle(
    path: Path, policy: str = "h2o", budget: float = 0.2, lookahead: int | None = None
) -> Path:
    table = make_policy(policy, MODEL, budget=budget, lookahead=lookahead)
    with write_bundle(path, False) as folder:
        fill(folder, small_config(policy=table))
        (folder / "onnx" / "decode_step.onnx").write_bytes(bytes(123_456))
    return path


# Help


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_instant(verb: str) -> None:
    code = (
        "import sys; from ssd_export.cli.main import main\n"
        f"try: main({[*filter(None, [verb]), '--help']!r})\n"
        f"finally: assert not [name for name in {HEAVY!r} if name in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: ssd-export"), done.stderr
    assert any(cpu_seconds(code) < 4 * of_click_alone() for _ in range(3)), (
        "four times what importing click takes"
    )


def cpu_seconds(code: str) -> float:
    """Processor time of an interpreter that runs the code, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@cache
def of_click_alone() -> float:
    return max(cpu_seconds("import click") for _ in range(3))


def test_help_names_every_verb_and_default(run: Run) -> None:
    text = run("--help").out
    assert all(verb in text for verb in VERBS)
    for verb in ("export", "generate"):
        options = run(verb, "--help").out.split("Options:")[1]
        for option in options.split("\n  --")[1:]:
            assert "[default:" in option or option.startswith(
                ("force", "greedy", "resume", "verbose")
            ), option


def test_a_verb_is_imported_only_when_asked() -> None:
    code = (
        "import sys; from ssd_export.cli.main import main\n"
        "try: main(['inspect', '--help'])\n"
        "finally: assert {'ssd_export.cli.inspect', 'ssd_export.cli.export'} & {*sys.modules} == "
        "{'ssd_export.cli.inspect'}"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.code == 0 and done.out == f"ssd-export, version {TOOL_VERSION}\n"
    try:
        installed = importlib.metadata.version("ssd-export")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs ssd-export installed: pip install -e .")
    assert installed == TOOL_VERSION


def test_the_checkout_has_a_command_too() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "--version"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0 and TOOL_VERSION in done.stdout
    bare = subprocess.run(
        [sys.executable, "-S", str(ROOT / "cli.py")], capture_output=True, text=True
    )
    assert (
        bare.returncode == 1 and bare.stderr.startswith("error: ") and bare.stderr.count("\n") == 1
    )


# Exit codes


@pytest.mark.parametrize(
    "args",
    [
        ("drawn",),
        ("generate",),
        ("export", "--no-such-option"),
        ("export", "x"),
        ("export", "--budget", "much"),
        ("generate", "x", "--seed", "1.5"),
        (),
    ],
)
def test_wrong_usage_exits_2(run: Run, args: tuple[str, ...]) -> None:
    done = run(*args)
    assert done.code == 2 and "Usage: " in done.err + done.out


BAD_VALUES = [
    ("export", "--budget", "0", "outside (0, 1]"),
    ("export", "--budget", "1.01", "outside (0, 1]"),
    ("export", "--budget", "-0.2", "outside (0, 1]"),
    ("export", "--budget", "nan", "outside (0, 1]"),
    ("export", "--prompt-slots", "0", "use 64"),
    ("export", "--dtype", "int3", "choose one of fp32, fp16, bf16"),
    ("generate", "x", "--seed", "-1", "use a number such as 0"),
    ("generate", "x", "--seed", str(2**64), "2**64"),
    ("generate", "x", "--num-images", "0", "use 1 or more"),
    ("generate", "x", "--cfg-scale", "nan", "use 5"),
    ("generate", "x", "--cfg-scale", "inf", "use 5"),
    ("generate", "x", "--temperature", "0", "--greedy"),
    ("generate", "x", "--temperature", "nan", "use 1.0"),
    ("generate", "x", "--top-k", "-1", "use 0"),
    ("generate", "x", "--out", "out.jpg", "use out.png"),
    ("generate", "x", "--out", ".", "is a folder"),
    ("generate", "x", "--out", "no/such/out.png", "no folder no/such"),
    ("generate", "x", "--out", "/proc/out.png", "cannot write"),
    ("generate", "x", "--save-tokens", ".", "is a folder"),
    ("generate", "x", "--preview", "/proc/preview", "cannot make the folder"),
    ("generate", "x", "run `ssd-export export`"),
    ("generate", "x", "--bundle", "nowhere", "no bundle at nowhere"),
    ("inspect", "run `ssd-export export`"),
    ("inspect", "nowhere", "no bundle at nowhere"),
]


@pytest.mark.parametrize("case", BAD_VALUES, ids=[" ".join(case[:-1]) for case in BAD_VALUES])
def test_a_bad_value_is_one_line_with_the_fix(
    run: Run, tmp_path: Path, case: tuple[str, ...]
) -> None:
    *args, fix = case
    done = run(*args)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and fix in done.err
    assert os.listdir(tmp_path) == []


def fake_export(monkeypatch: pytest.MonkeyPatch, export_bundle: Callable[..., Path]) -> None:
    def spec(**values: Any) -> SimpleNamespace:
        return SimpleNamespace(**values)

    module = SimpleNamespace(ExportSpec=spec, export_bundle=export_bundle)
    monkeypatch.setitem(sys.modules, "ssd_export.export.exporter", module)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("two\nlines \x1b[31mred"), 1, "error: two lines \\x1b[31mred\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_of_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(spec: object, progress: object, kept: object) -> Path:
        raise error

    fake_export(monkeypatch, fail)
    done = run("export")
    assert done.code == code and done.err.lstrip("\n") == line and done.out == ""


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(spec: object, progress: object, kept: object) -> Path:
        raise ZeroDivisionError

    fake_export(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        main(["export"])


# export


def test_export_hands_on_what_was_asked_and_remembers_the_bundle(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[SimpleNamespace] = []

    def export(
        spec: SimpleNamespace, progress: Callable[[str, int, int], None], kept: object
    ) -> Path:
        specs.append(spec)
        progress("weights", 1, 2)
        progress("weights", 2, 2)
        return small_bundle(spec.out or Path("bundles/demo"))

    fake_export(monkeypatch, export)
    done = run(
        "export",
        "--model",
        "m",
        "--policy",
        "ssd",
        "--budget",
        "0.5",
        "--window",
        "40",
        "--evict-every",
        "6",
        "--num-recent",
        "9",
        "--head-map",
        "h.json",
        "--prompt-slots",
        "32",
        "--dtype",
        "fp16",
        "--out",
        "x",
        "--force",
    )
    assert done.code == 0 and done.out == "x\n" and done.err.startswith("weights: done in ")
    assert vars(specs[0]) == dict(
        model="m",
        policy="ssd",
        budget=0.5,
        window=40,
        lookahead=None,
        decoder_weights="none",
        decoder_samples=None,
        evict_every=6,
        num_recent=9,
        head_map="h.json",
        groups=2,
        prompt_slots=32,
        dtype="fp16",
        out=Path("x"),
        force=True,
        lora=None,
        prompt_template=None,
        weights="none",
        head_weights=None,
        target=None,
        kv_dtype="model",
        resume=False,
        num_layers=None,
        revision=None,
        force_memory=False,
    )
    assert json.loads(run("inspect", "--json").out)["path"].endswith("/x")
    assert run("export").out == "bundles/demo\n"
    assert vars(specs[1]) == dict(
        model="demo",
        policy=None,
        budget=0.2,
        window=None,
        lookahead=None,
        decoder_weights="none",
        decoder_samples=None,
        evict_every=None,
        num_recent=None,
        head_map=None,
        groups=2,
        prompt_slots=None,
        dtype="fp32",
        out=None,
        force=False,
        lora=None,
        prompt_template=None,
        weights="none",
        head_weights=None,
        target=None,
        kv_dtype="model",
        resume=False,
        num_layers=None,
        revision=None,
        force_memory=False,
    )
    assert json.loads(run("inspect", "--json").out)["path"] == "bundles/demo"


# generate


class FakeGenerator:
    """Generates gray, and keeps what it was asked for."""

    asked: dict[str, Any] = {}

    def __init__(self, path: Path) -> None:
        self.bundle, self.config = open_bundle(path), MODEL
        self.table = SimpleNamespace(name="h2o", budget=0.2)
        self.runner = SimpleNamespace(max_images=1000, num_threads=1)

    @classmethod
    def from_bundle(
        cls,
        path: Path,
        runner: str,
        provider: str,
        num_threads: int | None,
        check: Callable[..., None],
        progress: Callable[[str, int, int], None],
    ) -> FakeGenerator:
        cls.asked = {"runner": runner, "provider": provider, "num_threads": num_threads}
        return cls(path)

    def __enter__(self) -> FakeGenerator:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stream(
        self,
        prompts: tuple[str, ...],
        image_done: Callable[[int, Image.Image], None],
        progress: Callable[[str, int, int], None],
        **options: Any,
    ) -> Iterator[SimpleNamespace]:
        type(self).asked |= {"prompts": prompts, **options}
        cache = SimpleNamespace(bytes_per_image=1234567, image_share=0.2061, tokens_evicted=8000)
        count = len(prompts) * options["num_images"]
        images = [Image.new("RGB", (48, 48), (index, 0, 0)) for index in range(count)]
        for row in range(24):
            last = row == 23
            if last:
                list(map(image_done, range(count), images))
            progress(f"generating {count} images", 24 * (row + 1), 576)
            yield SimpleNamespace(
                cache=cache,
                row=row,
                tokens=np.full((count, 576), row, np.int32),
                done=last,
                images=images if last or options["preview"] else None,
            )


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> type[FakeGenerator]:
    monkeypatch.setitem(
        sys.modules,
        "ssd_export.runtime.generate",
        SimpleNamespace(ImageGenerator=FakeGenerator, MAX_BATCH=16),
    )
    return FakeGenerator


def test_generate_makes_one_image(
    run: Run, tmp_path: Path, generator: type[FakeGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    bundle = open_bundle(small_bundle(tmp_path / "b"))
    done = run("generate", "a red circle", "--bundle", "b", "--seed", "7")
    assert done.code == 0, done.err
    assert (
        done.out.startswith("out.png: 1 image in ")
        and "tokens/s), policy h2o, budget 0.2" in done.out
        and "1,234,567 bytes" in done.out
        and "0.206" in done.out
    )
    assert done.err.splitlines()[:4] == [
        "bundle b: small, policy h2o, budget 0.2, float16",
        "runner ort (ONNX Runtime) on cpu",
        "float16 weights are multiplied as float32 on this CPU, which takes its memory and time;"
        " export with --dtype fp32 --weights int8 for half of both",
        "1 thread of the CPU",
    ]
    assert "generating 1 images: done in" in done.err
    assert generator.asked == dict(
        runner="ort",
        provider="cpu",
        num_threads=None,
        prompts=("a red circle",),
        seed=7,
        num_images=1,
        cfg_scale=None,
        temperature=None,
        top_k=0,
        preview=False,
        max_batch=16,
        decoder_batch=1,
        lookahead=1,
        negative_prompt="",
    )
    with Image.open("out.png") as image:
        assert image.text == {
            "prompt": "a red circle",
            "image": "0",
            "seed": "7",
            "policy": "h2o",
            "budget": "0.2",
            "num_images": "1",
            "bundle_hash": bundle.hash,
            "tool_version": TOOL_VERSION,
            "cfg_scale": "5",
            "temperature": "1",
            "top_k": "0",
        }
    assert sorted(os.listdir()) == ["b", "out.png"]


def test_generate_makes_several_with_tokens_and_previews(
    run: Run, tmp_path: Path, generator: type[FakeGenerator]
) -> None:
    small_bundle(tmp_path / "b")
    done = run(
        "generate",
        "one",
        "two",
        "--bundle",
        "b",
        "--num-images",
        2,
        "--greedy",
        "--cfg-scale",
        2.5,
        "--out",
        "g.png",
        "--save-tokens",
        "t.npy",
        "--preview",
        "p",
        "--runner",
        "torch",
        "--provider",
        "cuda",
    )
    assert done.code == 0, done.err
    assert (
        generator.asked
        | dict(temperature=0.0, cfg_scale=2.5, preview=True, runner="torch", provider="cuda")
        == generator.asked
    )
    assert sorted(os.listdir()) == [
        "b",
        "g-000.png",
        "g-001.png",
        "g-002.png",
        "g-003.png",
        "g.png",
        "p",
        "t.npy",
    ]
    tokens = np.load("t.npy")
    assert tokens.shape == (4, 576) and tokens.dtype == np.int32 and (tokens == 23).all()
    assert sorted(os.listdir("p")) == [f"row-{row:02d}.png" for row in range(24)]
    with Image.open("g-002.png") as image:
        assert (image.text["prompt"], image.text["image"], image.text["temperature"]) == (
            "two",
            "2",
            "greedy",
        )
    with Image.open("g.png") as sheet:
        assert sheet.text["prompt"] == "one\ntwo" and sheet.width > 96


# inspect


def test_inspect_shows_what_is_in_a_bundle(run: Run, tmp_path: Path) -> None:
    bundle = open_bundle(small_bundle(tmp_path / "b", "streaming-llm"))
    bundle.add_files(
        {
            "engines/rtx1.7-sm90-linux-x86_64/decode_step.engine": b"engine",
            "reports/verify.json": b"{}",
        }
    )
    table = make_policy("streaming-llm", MODEL, budget=0.2)
    facts = json.loads(run("inspect", "b", "--json").out)
    assert facts["hash"] == bundle.hash and facts["policy"]["image_slots_mean"] == 115
    assert facts["bytes_per_image"] == {
        "cache": table.cache_bytes(MODEL, 2, 2),
        "full_cache": table.full_cache_bytes(MODEL, 2, 2),
        "image_slots": table.image_cache_bytes(MODEL, 2, 2),
        "full_image_slots": table.full_image_cache_bytes(MODEL, 2, 2),
    }
    assert facts["policy"]["layers"][2] == [
        {"rule": "newest tokens + the prompt", "num_heads": 2, "num_slots": 179, "evict_every": 1}
    ]
    assert facts["reports"] == ["reports/verify.json"]
    text = run("inspect", "b").out
    for part in (
        "3 layers, 4 heads, 2 KV heads of 8",
        "float16",
        "streaming-llm, budget 0.2",
        "115.0 of 576",
        "0-2",
        "newest tokens + the prompt",
        "179",
        "onnx/decode_step.onnx",
        "123 kB",
        "rtx1.7-sm90-linux-x86_64",
        bundle.hash,
    ):
        assert part in " ".join(text.split()), part


def test_inspect_names_the_lookahead_that_a_bundle_fits(run: Run, tmp_path: Path) -> None:
    small_bundle(tmp_path / "plain", "h2o")
    small_bundle(tmp_path / "ahead", "h2o", lookahead=8)
    line = "heads evict before the same steps, at least 8 apart, for lookahead"
    assert line in " ".join(run("inspect", "ahead").out.split())
    assert "for lookahead" not in run("inspect", "plain").out
    assert json.loads(run("inspect", "ahead", "--json").out)["policy"]["lookahead"] == 8
    assert json.loads(run("inspect", "plain", "--json").out)["policy"]["lookahead"] is None


def test_inspect_names_each_rule(run: Run, tmp_path: Path) -> None:
    small_bundle(tmp_path / "full", "full", 1.0)
    small_bundle(tmp_path / "h2o", "h2o")
    assert "everything" in run("inspect", "full").out
    assert "highest scores + the prompt + 57 recent" in run("inspect", "h2o").out


def test_inspect_finds_a_changed_byte(run: Run, tmp_path: Path) -> None:
    path = small_bundle(tmp_path / "b") / "onnx" / "decode_step.onnx"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    done = run("inspect", "b")
    assert (
        done.code == 1
        and "onnx/decode_step.onnx was changed" in done.err
        and done.err.count("\n") == 1
    )


# Progress


def test_plain_progress_is_a_line_every_few_seconds() -> None:
    times = iter([0.0, 0.0, 0.0, 1.0, 6.0, 8.0, 20.0, 20.0, 20.0, 20.4])
    stream = io.StringIO()
    with ProgressReport(stream, lambda: next(times)) as progress:
        for done in (0, 1, 25, 50, 100):
            progress("weights", done, 100)
        progress("graphs", 4, 4)
    assert (
        stream.getvalue()
        == "weights: 25 %, 18 s left\nweights: done in 20 s\ngraphs: done in 0.4 s\n"
    )


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressReport(stream) as progress:
        progress("generating", 3, 24)
        progress("generating", 24, 24)
    assert (
        "generating" in stream.getvalue()
        and "100%" in stream.getvalue()
        and "\x1b[" in stream.getvalue()
    )


def test_help_says_what_every_verb_does_in_a_whole_sentence(run: Run) -> None:
    commands = " ".join(run("--help").out.partition("Commands:")[2].split())
    assert "..." not in commands
    assert (
        "plan Estimate memory, disk and time of every stage, and say what does not fit." in commands
    )


def test_an_unknown_verb_names_the_one_it_is_close_to(run: Run) -> None:
    done = run("generat", "x")
    assert done.code == 2 and "Did you mean generate?" in done.err
    assert "Did you mean" not in run("zzz").err
