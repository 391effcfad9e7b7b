"""Broken and hostile bundles: the C++ library refuses them in Python's sentences, and never
aborts.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from tests.bundle.mutations import REMOVED, WRONG_VALUES, mutated, places
from tests.engines.builds import Builds, memory_checked
from tests.engines.cases import run_cases
from tests.scene_bundles import rewrite_manifest

Exported = Callable[..., Path]
BAD_BUNDLE = 3
NUM_MUTATIONS = 250


def no_config(bundle: Path) -> None:
    (bundle / "ssd_config.json").unlink()


def no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def no_graph(bundle: Path) -> None:
    (bundle / "onnx" / "decode_step.onnx").unlink()


def shorter_weights(bundle: Path) -> None:
    path = bundle / "onnx" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def changed_weights(bundle: Path) -> None:
    path = bundle / "onnx" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_config(**values: object) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        path = bundle / "ssd_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        rewrite_manifest(bundle)

    return edit


def edit_policy(bundle: Path) -> None:
    path = bundle / "ssd_config.json"
    values = json.loads(path.read_text())
    values["policy"]["layers"][0][0]["rule"]["num_recent"] = 600
    path.write_text(json.dumps(values))
    rewrite_manifest(bundle)


def edit_manifest(name: str) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        path = bundle / "manifest.json"
        values = json.loads(path.read_text())
        values["files"] = dict(
            sorted({**values["files"], name: {"bytes": 1, "sha256": "0" * 64}}.items())
        )
        path.write_text(json.dumps(values, indent=1) + "\n")

    return edit


def pipe_for_config(bundle: Path) -> None:
    import os

    (bundle / "ssd_config.json").unlink()
    os.mkfifo(bundle / "ssd_config.json")


def manifest_in_another_form(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def ends_before_the_embeddings(bundle: Path) -> None:
    path = bundle / "ssd_config.json"
    values = json.loads(path.read_text())
    values["text_embeddings"]["offset"] += 8
    path.write_text(json.dumps(values))
    rewrite_manifest(bundle)


# Where Python speaks of the command line, or of itself as the reader.
OTHER_WORDS = {
    "or give --bundle DIR": "or give the folder of one",
    "this is ssd-export 0.1.0, which": "this is ssd_runtime 0.1.0, which",
    "use ssd-export 7": "use ssd_runtime 7",
    "with this one": "with ssd-export 0.1.0",
}
BROKEN: dict[str, Callable[[Path], None]] = {
    "no config": no_config,
    "no manifest": no_manifest,
    "no graph": no_graph,
    "cut": shorter_weights,
    "changed": changed_weights,
    "newer": edit_config(schema_version=99, tool_version="7.0.0"),
    "no version": edit_config(schema_version=0),
    "R9": edit_policy,
    "a name outside": edit_manifest("../outside"),
    "an absolute name": edit_manifest("/etc/passwd"),
    "a name with a colon": edit_manifest("c:evil"),
    "a file that is not there": edit_manifest("onnx/more.onnx"),
    "a named pipe": pipe_for_config,
    "a manifest in another form": manifest_in_another_form,
    "no room for the embeddings": ends_before_the_embeddings,
}


@pytest.mark.slow
def test_refusals_are_pythons(build: Builds, exported: Exported, tmp_path: Path) -> None:
    bundles = {name: exported() for name in BROKEN}
    for name, damage in BROKEN.items():
        damage(bundles[name])
    results = run_cases(
        memory_checked(build),
        [{"bundle": str(bundle), "encode": []} for bundle in bundles.values()],
        tmp_path,
    )
    for name, made in zip(BROKEN, results, strict=True):
        with pytest.raises(UserError) as refused:
            open_bundle(bundles[name])
        wanted = str(refused.value)
        for ours, theirs in OTHER_WORDS.items():
            wanted = wanted.replace(ours, theirs)
        assert made.facts == {"status": BAD_BUNDLE, "error": wanted}, name


def mutations(text: str) -> list[bytes]:
    """Documents with one value replaced, outside the graphs more often than inside."""
    rng = random.Random(11)
    every = places(json.loads(text))
    inside = [place for place in every if place[0] == "graphs"]
    outside = [place for place in every if place[0] != "graphs"]
    return [
        mutated(
            text,
            rng.choice(inside if inside and index % 4 == 0 else outside),
            rng.choice([REMOVED, *WRONG_VALUES]),
        )
        for index in range(NUM_MUTATIONS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ssd_config.json", "tokenizer.json"])
def test_one_wrong_value_anywhere(
    file: str, build: Builds, exported: Exported, tmp_path: Path
) -> None:
    whole = exported()
    text = (whole / file).read_text(encoding="utf-8")
    asked = []
    for index, content in enumerate(mutations(text)):
        bundle = tmp_path / f"b{index}"
        shutil.copytree(whole, bundle, copy_function=lambda a, b: Path(b).symlink_to(a))
        (bundle / file).unlink()
        (bundle / file).write_bytes(content)
        rewrite_manifest(bundle)
        asked.append({"bundle": str(bundle), "prompts": ["a red circle"], "first_row": True})
    results = run_cases(memory_checked(build), asked, tmp_path)
    refused = [made.facts["error"] for made in results if "error" in made.facts]
    assert len(refused) > NUM_MUTATIONS / 4
    for sentence in refused:
        assert "\n" not in sentence, sentence
        assert "; " in sentence or ": " in sentence, sentence


@pytest.mark.slow
def test_graphs_that_are_none(build: Builds, exported: Exported, tmp_path: Path) -> None:
    bundle = exported()
    (bundle / "onnx" / "prefill.onnx").write_bytes(b"not a graph")
    rewrite_manifest(bundle)
    (made,) = run_cases(build("release"), [{"bundle": str(bundle), "encode": []}], tmp_path)
    assert "onnxruntime could not open" in made.facts["error"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_a_token_id_is_a_whole_number_that_int32_holds(
    place: str, build: Builds, exported: Exported, tmp_path: Path
) -> None:
    bundles = {value: exported() for value in (1e300, 0.5, -1, 2**31)}
    for value, bundle in bundles.items():
        path = bundle / "tokenizer.json"
        spec = json.loads(path.read_text(encoding="utf-8"))
        if place == "vocab":
            spec["model"]["vocab"][next(iter(spec["model"]["vocab"]))] = value
        else:
            spec["added_tokens"][-1]["id"] = value
        path.write_text(json.dumps(spec), encoding="utf-8")
        rewrite_manifest(bundle)
    asked = [{"bundle": str(bundle), "encode": ["a"]} for bundle in bundles.values()]
    *wrong, large = [
        made.facts["error"] for made in run_cases(memory_checked(build), asked, tmp_path)
    ]
    assert all("is not a tokenizer.json (" in error for error in wrong)
    assert large == (
        "tokenizer.json has the token id 2147483648, which is too large: download it again"
    )
