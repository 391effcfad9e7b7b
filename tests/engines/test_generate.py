"""The C++ library generates what Python generates: the same tokens, the same pixels, the same
events.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssd_export.runtime.generate import ImageGenerator
from tests.engines.builds import Builds
from tests.engines.cases import (
    CASES,
    LOOKAHEAD_AUTO,
    Case,
    Made,
    checksum,
    generated_by_python,
    prompt_encoder,
    run_cases,
)
from tests.scene_bundles import rewrite_manifest

pytestmark = pytest.mark.slow

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(
    build: Builds, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Made]:
    asked = [case.to_json(bundles(case.bundle)) for case in CASES.values()]
    results = run_cases(build("release"), asked, tmp_path_factory.mktemp("cases"))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_pixels_are_pythons(name: str, made: dict[str, Made], bundles: Bundles) -> None:
    case, generated = CASES[name], made[name]
    assert "error" not in generated.facts, generated.facts
    expected = generated_by_python(case, bundles(case.bundle))
    assert len(np.unique(expected.tokens)) > 10, "a case whose tokens could not differ"
    np.testing.assert_array_equal(generated.tokens, expected.tokens)
    np.testing.assert_array_equal(generated.pixels, expected.pixels)
    assert generated.facts["cache_bytes"] == expected.facts["cache"].bytes
    assert generated.facts["planned_cache_bytes"] == expected.facts["cache"].bytes
    assert generated.facts["passes"] == expected.facts["passes"]
    assert generated.facts["tokens_evicted"] == expected.facts["cache"].tokens_evicted
    check_events(case, generated, expected)


def check_events(case: Case, generated: Made, expected: Made) -> None:
    """An event a row, with the present batch's images, which Python counts from the first on."""
    events = generated.facts["events"]
    assert [event[0] for event in events] == expected.facts["rows"]
    assert [event[3] for event in events] == [0] * (len(events) - 1) + [1]
    num_rows = len(set(expected.facts["rows"]))
    for (row, first, count, _, pixels), shown in zip(events, expected.facts["shown"], strict=True):
        if row == num_rows - 1:
            assert pixels == checksum(list(expected.pixels[first : first + count]))
        elif case.options.get("preview"):
            assert pixels == checksum(shown[:count])
        else:
            assert pixels == 0


def test_ids_in_place_of_text(build: Builds, bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("ssd-auto")
    encoder = prompt_encoder(bundle)
    prompts = ["a red circle", "two green triangles"]
    ids = [encoder.encode([prompt], 64).ids[0].tolist() for prompt in prompts]
    by_ids, by_text = run_cases(
        build("release"),
        [{"bundle": str(bundle), "ids": ids}, {"bundle": str(bundle), "prompts": prompts}],
        tmp_path,
    )
    np.testing.assert_array_equal(by_ids.pixels, by_text.pixels)


def test_negative_prompts_of_each_image_and_as_ids(
    build: Builds, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = bundles("ssd-auto")
    texts = ["a blue square", "", "two green triangles", "red"]
    ids = [
        prompt_encoder(bundle).encode([text], 64).ids[0].tolist() if text else [] for text in texts
    ]
    asked = {
        "bundle": str(bundle),
        "prompts": ["a red circle", "a square"],
        "num_images": 2,
        "cfg_scale": 4.0,
    }
    by_text, by_ids = run_cases(
        build("release"),
        [{**asked, "negative_prompt": texts}, {**asked, "negative_ids": ids}],
        tmp_path,
    )
    prompts = [prompt for prompt in asked["prompts"] for _ in range(2)]
    expected = generated_by_python(
        Case("ssd-auto", tuple(prompts), {"negative_prompt": texts, "cfg_scale": 4.0}), bundle
    )
    for made in (by_text, by_ids):
        assert "error" not in made.facts, made.facts
        np.testing.assert_array_equal(made.tokens, expected.tokens)


def test_lookahead_changes_the_passes_alone(
    build: Builds, bundles: Bundles, tmp_path: Path
) -> None:
    asked = {"bundle": str(bundles("ssd-auto")), "prompts": ["a red circle"], "seed": 5}
    made = run_cases(
        build("release"), [{**asked, "lookahead": tried} for tried in (1, 2, 8, 30)], tmp_path
    )
    for ahead in made[1:]:
        np.testing.assert_array_equal(ahead.pixels, made[0].pixels)
        assert ahead.facts["passes"] < made[0].facts["passes"] == 575


def test_a_bundle_without_the_graph_of_lookahead(
    build: Builds, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = tmp_path / "earlier"
    shutil.copytree(bundles("ssd-auto"), bundle)
    path = bundle / "ssd_config.json"
    values = json.loads(path.read_text())
    for name in ("decode_window", "decode_window_top_k"):
        del values["graphs"][name]
    path.write_text(json.dumps(values))
    rewrite_manifest(bundle)
    asked = {"bundle": str(bundle), "prompts": ["a red circle"], "first_row": True}
    refused, chosen = run_cases(
        build("release"),
        [{**asked, "lookahead": tried} for tried in (8, LOOKAHEAD_AUTO)],
        tmp_path,
    )
    with ImageGenerator.from_bundle(bundle) as generator:
        words = generator.runner.no_window.replace("--lookahead off", "lookahead 1")
    assert refused.facts["error"] == words
    assert "error" not in chosen.facts
