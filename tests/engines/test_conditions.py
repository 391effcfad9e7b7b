"""Models whose prompts are not text: the C++ library generates what Python does from a class or
from the embeddings of a caption.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssd_export.export.exporter import ExportSpec, export_bundle
from tests.engines.builds import Builds
from tests.engines.cases import Case, generated_by_python, run_cases
from tests.llamagen_checkpoints import CAPTION_TOKENS, TinyLlamaGen, write_llamagen_checkpoint

pytestmark = pytest.mark.slow

NAMES = [f"Kind {number}" for number in range(10)]


@pytest.fixture(scope="module")
def classes(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    tiny = TinyLlamaGen(num_layers=1, side=8)
    model = write_llamagen_checkpoint(
        folder / "model", tiny, num_classes=len(NAMES), class_names=NAMES
    )
    spec = ExportSpec(str(model), policy="streaming-llm", budget=0.5, out=folder / "bundle")
    return export_bundle(spec)


def test_classes_by_number_name_and_id(build: Builds, classes: Path, tmp_path: Path) -> None:
    cases = [
        Case("classes", ("3", "kind 7"), {"seed": 1, "cfg_scale": 4.0}),
        Case("classes", ("KIND 0",), {"cfg_scale": 2.0, "negative_prompt": "5", "num_images": 2}),
        Case("classes", ("9",), {"cfg_scale": 1.0, "top_k": 20}),
    ]
    by_id = {"bundle": str(classes), "ids": [[3], [7]], "seed": 1, "cfg_scale": 4.0}
    made = run_cases(
        build("release"), [by_id, *(case.to_json(classes) for case in cases)], tmp_path
    )
    for case, generated in zip([cases[0], *cases], made, strict=True):
        assert "error" not in generated.facts, generated.facts
        expected = generated_by_python(case, classes)
        assert len(np.unique(expected.tokens)) > 10
        np.testing.assert_array_equal(generated.tokens, expected.tokens)
        np.testing.assert_array_equal(generated.pixels, expected.pixels)


def test_what_is_no_class_is_refused(build: Builds, classes: Path, tmp_path: Path) -> None:
    asked = [{"prompts": ["10"]}, {"prompts": ["a cat"]}, {"ids": [[10]]}, {"ids": [[1, 2]]}]
    made = run_cases(build("release"), [{"bundle": str(classes), **one} for one in asked], tmp_path)
    way_out = "give a number in 0 .. 9, or a name such as 'kind 0'"
    assert [one.facts["error"] for one in made] == [
        f"class 10 is beyond the model's last: {way_out}",
        f"'a cat' is no class of this model: {way_out}",
        f"class 10 is beyond the model's last: {way_out}",
        f"the prompt number 0 has 2 ids, and a class is one number: {way_out}",
    ]


@pytest.fixture(scope="module")
def captions(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    tiny = TinyLlamaGen(num_layers=1, side=8, caption_dim=24)
    model = write_llamagen_checkpoint(folder / "model", tiny)
    spec = ExportSpec(str(model), policy="streaming-llm", budget=0.5, out=folder / "bundle")
    return export_bundle(spec)


def test_embeddings_of_captions(build: Builds, captions: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((length, 24)).astype(np.float32) for length in (3, CAPTION_TOKENS)]
    options = {"cfg_scale": 3.0, "num_images": 2, "max_batch": 3, "seed": 4}
    asked = {
        "bundle": str(captions),
        "embeddings": [one.reshape(-1).tolist() for one in given],
        "embedding_width": 24,
        **options,
    }
    (made,) = run_cases(build("release"), [asked], tmp_path)
    assert "error" not in made.facts, made.facts
    expected = generated_by_python(Case("captions", tuple(given), options), captions)
    assert len(np.unique(expected.tokens)) > 10
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.pixels, expected.pixels)


def test_what_is_no_caption_is_refused(
    build: Builds, captions: Path, classes: Path, tmp_path: Path
) -> None:
    many = [0.5] * 24 * (CAPTION_TOKENS + 1)
    asked = [
        {"bundle": str(captions), "prompts": ["a red circle"]},
        {"bundle": str(captions), "ids": [[1, 2, 3]]},
        {"bundle": str(captions), "embeddings": [many], "embedding_width": 24},
        {"bundle": str(captions), "embeddings": [[1e39] * 24], "embedding_width": 24},
        {"bundle": str(classes), "embeddings": [[0.5] * 64], "embedding_width": 64},
    ]
    errors = [made.facts["error"] for made in run_cases(build("release"), asked, tmp_path)]
    words = ("reads captions as embeddings", "has ids", "1 to 12 fit", "NaN or infinity", "itself")
    assert all(word in error for word, error in zip(words, errors, strict=True)), errors
