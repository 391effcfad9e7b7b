"""AddressSanitizer (with leaks), UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind over
generation, misuse, cancelling at every row and several threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.builds import ENGINES, Builds, run, sanitized
from tests.engines.cases import LONG, TWO, Case, run_cases
from tests.engines.test_misuse import FEW_MODELS, run_misuse

Bundles = Callable[[str], Path]
CASES = {
    "defaults": Case("ssd-auto", ("a red circle", "two blue squares"), {"max_batch": 1}),
    "top-k and previews": Case("ssd-auto", options={"top_k": 5, "preview": True}),
    "decaying scores": Case("linear"),
    "int8 cache": Case("kv-int8"),
    "int4": Case("int4"),
    "negative prompts": Case("linear", TWO, {"cfg_scale": 2.0, "negative_prompt": ["", LONG]}),
    "lookahead": Case("ssd-auto", options={"lookahead": 12, "top_k": 20}),
    "lookahead where it pays": Case("ssd-auto", options={"lookahead": "auto"}),
    "lookahead of two at once": Case("linear", TWO, {"lookahead": 6}),
}
SUPPRESSED = {"TSAN_OPTIONS": f"suppressions={ENGINES / 'tests' / 'thread_sanitizer.txt'}"}
# What valgrind runs in minutes; the rest is the sanitizers' part.
SHORT = ["null_handles", "wrong_models", "wrong_prompts", "destroyed_in_any_order", "png_files"]
THREADS = [
    "calls_inside_a_callback",
    "cancelled_from_another_thread",
    "destroyed_in_any_order",
    "two_generations_in_two_threads",
    "two_models_in_two_threads",
]


pytestmark = pytest.mark.skipif(
    "SSD_EXPORT_SANITIZERS" not in os.environ,
    reason="takes many minutes: SSD_EXPORT_SANITIZERS=1 make test TESTS=tests/engines",
)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_misuse(sanitizer: str, build: Builds, bundles: Bundles, tmp_path: Path) -> None:
    names = THREADS if sanitizer == "thread" else []
    run_misuse(
        sanitized(build, sanitizer),
        bundles("ssd-auto"),
        tmp_path,
        *names,
        **FEW_MODELS,
        **SUPPRESSED,
    )


@pytest.mark.slow
def test_generation(build: Builds, bundles: Bundles, tmp_path: Path) -> None:
    asked = [case.to_json(bundles(case.bundle)) for case in CASES.values()]
    for made in run_cases(sanitized(build, "address,undefined"), asked, tmp_path):
        assert "error" not in made.facts, made.facts


@pytest.mark.slow
def test_valgrind_finds_no_leak(build: Builds, bundles: Bundles, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind: engines/scripts/install_dependencies.sh")
    checked = run(
        ["valgrind", "--leak-check=full", "--show-leak-kinds=definite", "--error-exitcode=9", "-q"]
        + [f"--suppressions={ENGINES / 'tests' / 'valgrind.supp'}"]
        + [build("release") / "tests" / "ssd_misuse", bundles("ssd-auto"), *SHORT],
        cwd=tmp_path,
    )
    assert checked.returncode == 0, checked.stdout[-1000:] + checked.stderr[-4000:]
