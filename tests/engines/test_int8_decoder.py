"""The C++ library decodes images with the int8 decoder where Python does, in its fused form and in
that of ordinary operators: the same pixels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.bundle.graphs import FUSED, INT8_DECODER
from ssd_export.machine import multiplies_int8_exactly
from ssd_export.runtime.ort_operators import LIBRARY, LIBRARY_VARIABLE
from ssd_export.runtime.ort_runner import OrtRunner
from tests.engines.builds import Builds, build_operators
from tests.engines.cases import Case, Made, run_cases
from tests.engines.conftest import INT8_DECODER as BUNDLE
from tests.made_once import made_once, run_folder
from tests.scene_bundles import rewrite_manifest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not multiplies_int8_exactly(),
        reason="needs int8 products without saturation (VNNI, ARM)",
    ),
]
Bundles = Callable[[str], Path]
CASE = Case(
    BUNDLE,
    ("a red circle above a blue square", "three small yellow triangles on black"),
    {"decoder_batch": 2, "seed": 6},
)


@pytest.fixture
def operators(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives Python the operators that the C++ library has built in."""
    if LIBRARY_VARIABLE not in os.environ:
        folder = made_once(run_folder(tmp_path_factory) / "operators" / "best", build_operators)
        monkeypatch.setenv(LIBRARY_VARIABLE, str(folder / LIBRARY))


@pytest.fixture
def portable(bundles: Bundles, tmp_path: Path) -> Path:
    """The bundle as it was before the fused form: its int8 decoder has ordinary operators alone."""
    path = tmp_path / "portable"
    shutil.copytree(bundles(BUNDLE), path)
    (path / "onnx" / f"{INT8_DECODER}{FUSED}.onnx").unlink()
    rewrite_manifest(path)
    return path


def made_by_library(build: Builds, bundle: Path, folder: Path) -> Made:
    (made,) = run_cases(build("release"), [CASE.to_json(bundle)], folder)
    assert "error" not in made.facts, made.facts
    assert made.facts["decodes_in_int8"] == 1 and made.facts["why_float_decoder"] == ""
    return made


def decoded_by_python(bundle: Path, tokens: np.ndarray, **options: bool) -> np.ndarray:
    runner = OrtRunner(open_bundle(bundle), **options)
    try:
        assert runner.decodes_in_int8 is not options.get("exact", False)
        assert runner.decodes_by_operators is (options == {} and "portable" not in bundle.name)
        return runner.decode_image(tokens)
    finally:
        runner.close()


def test_the_fused_form_makes_pythons_pixels(
    build: Builds, bundles: Bundles, operators: None, tmp_path: Path
) -> None:
    bundle = bundles(BUNDLE)
    made = made_by_library(build, bundle, tmp_path)
    fused = decoded_by_python(bundle, made.tokens)
    np.testing.assert_array_equal(made.pixels, fused)
    assert not np.array_equal(fused, decoded_by_python(bundle, made.tokens, uses_operators=False))


def test_ordinary_operators_make_pythons_pixels(
    build: Builds, portable: Path, operators: None, tmp_path: Path
) -> None:
    made = made_by_library(build, portable, tmp_path)
    ordinary = decoded_by_python(portable, made.tokens, uses_operators=False)
    np.testing.assert_array_equal(made.pixels, ordinary)
    assert not np.array_equal(ordinary, decoded_by_python(portable, made.tokens, exact=True))


def test_a_bundle_without_it_decodes_in_float(
    build: Builds, bundles: Bundles, tmp_path: Path
) -> None:
    case = {"bundle": str(bundles("ssd-auto")), "prompts": ["a square"], "first_row": True}
    (made,) = run_cases(build("release"), [case], tmp_path)
    assert made.facts["decodes_in_int8"] == 0 and made.facts["why_float_decoder"] == ""
