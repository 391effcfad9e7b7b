"""Models whose prompts are not text: the C++ library generates what Python does from a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssd_export.export.exporter import ExportSpec, export_bundle
from tests.engines.builds import Builds
from tests.engines.cases import Case, generated_by_python, run_cases
from tests.llamagen_checkpoints import TinyLlamaGen, write_llamagen_checkpoint

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
