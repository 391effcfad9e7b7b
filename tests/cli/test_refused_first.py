"""Options that will not do are refused before any work: before a bundle is looked for, and before
torch, ONNX Runtime or numpy is loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNERS = "one of ort (ONNX Runtime), torch (PyTorch)"
CASES = [
    *(
        (verb, *options, fix)
        for verb in ("generate x", "eval", "bench", "sweep", "serve")
        for *options, fix in (
            ("--runner", "trrt", RUNNERS),
            ("--provider", "x", "use cpu or cuda"),
            ("--threads", "100000", "--threads 100000 is above"),
            ("--threads", "0", "--threads 0 is below 1"),
        )
    ),
    *(
        (verb, "--batch", "1000000000", "--batch 1000000000 is above 4096")
        for verb in ("generate x", "eval", "bench", "sweep")
    ),
    *(
        (verb, *options, fix)
        for verb in ("generate x", "eval", "sweep")
        for *options, fix in (
            ("--cfg-scale", "1e39", "--cfg-scale 1e+39 is outside"),
            ("--cfg-scale", "-5", "use 5, or 1 for no guidance"),
            ("--temperature", "nan", "--temperature nan is not a number"),
        )
    ),
    ("generate x", "--num-images", "1000000000", "--num-images 1000000000 is above"),
    ("generate x", "--decoder-batch", "0", "--decoder-batch 0 is below 1"),
    ("generate x", "--top-k", "-1", "--top-k -1 is below 0"),
    ("generate x", " ", "a PROMPT is empty"),
    ("export", "--policy", "full", "--budget", "0.2", "--policy full keeps everything"),
    ("plan", "--policy", "full", "--budget", "0.2", "--policy full keeps everything"),
    ("generate x", "--ray", "--ray is for a file of prompts"),
    ("generate x", "--ray-workers", "2", "--ray-workers is for a file of prompts"),
    ("generate", "--prompts", "x", "--ray-workers", "2", "give --ray, or leave it out"),
    ("eval", "--num-prompts", "1000000000", "--num-prompts 1000000000 is above 100000"),
    ("eval", "--weights", "int3", "choose one of none, int8, int4"),
    ("bench", "--baselines", "nope", "unknown baseline 'nope'"),
    ("bench", "--steps", "0", "--steps 0 times nothing"),
    ("bench", "--batch", "1,0", "--batch 0 is below 1"),
    ("bench", "--profile", "--runner", "torch", "use --runner ort"),
    ("sweep", "--policies", "h2o@evict-every=0", "evict-every=0 is below 1"),
    ("sweep", "--policies", "ssd-row@window=-3", "window=-3 is below 1"),
    ("sweep", "--policies", "streaming-llm@num-sinks=-2", "num-sinks=-2 is below -1"),
    ("sweep", "--num-prompts", "1000000000", "--num-prompts 1000000000 is above"),
    ("sweep", "--seeds", "1000000000", "--seeds 1000000000 is above"),
    ("sweep", "--jobs", "0", "--jobs 0 is below 1"),
    ("verify", "--level", "x", "choose one of ops, layers"),
    ("verify", "--against", "x", "choose one of ort, torch"),
    ("verify", "--provider", "x", "use cpu or cuda"),
    ("verify", "--threads", "100000", "--threads 100000 is above"),
    ("verify", "--seed", "-1", "--seed -1"),
    ("calibrate", "--threads", "100000", "--threads 100000 is above"),
    ("calibrate", "--num-images", "1000000000", "--num-images 1000000000 is above"),
    ("calibrate", "--tau", "nan", "outside [0, 1]"),
    ("export", "--threads", "100000", "--threads 100000 is above"),
    ("train-demo", "--threads", "100000", "--threads 100000 is above"),
    ("train-demo", "--device", "x", "choose one of cpu, cuda"),
    ("train-demo", "--steps", "0", "--steps 0 is below 1"),
]
SCRIPT = """
import contextlib, io, json, sys
from ssd_export.cli.main import main

for args in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as end:
            code = end.code
    loaded = [name for name in ("torch", "onnxruntime", "numpy", "onnx") if name in sys.modules]
    print(json.dumps({"code": code, "err": err.getvalue(), "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict]:
    """How every case ended, one after the other in a fresh process in an empty folder."""
    arguments = [[*case[0].split(), *case[1:-1]] for case in CASES]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(arguments),
        cwd=tmp_path_factory.mktemp("empty"),
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(CASES, ended, strict=True))


@pytest.mark.parametrize("case", CASES, ids=[" ".join(case[:-1]) for case in CASES])
def test_it_is_refused_in_one_line_before_anything_is_loaded(
    refusals: dict[tuple[str, ...], dict], case: tuple[str, ...]
) -> None:
    ended = refusals[case]
    assert ended["code"] == 1 and ended["loaded"] == []
    assert ended["err"].startswith("error: ") and ended["err"].count("\n") == 1
    assert case[-1] in ended["err"]
