"""Graphs, weights and tokenizers that are cut, random, empty or of another bundle, beside a
manifest that fits them: one sentence, from every runner.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssd_export.bundle.manifest import FileEntry, read_manifest, write_manifest
from ssd_export.errors import UserError
from ssd_export.runtime.generate import ImageGenerator
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

TINY = TinyJanus(seed=5)
WEIGHTS = "onnx/weights.safetensors"
GRAPHS = tuple(
    f"onnx/{name}.onnx"
    for name in ("prefill", "prefill_top_k", "decode_step", "decode_step_top_k", "image_decoder")
)
RUNNERS = ("ort", "torch")


@pytest.fixture(scope="module")
def whole() -> Path:
    return bundle(checkpoint(TINY), "h2o", 0.3, evict_every=24)


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """A copy of the bundle with one file's content replaced, and the manifest made to fit."""
    copy = Path(shutil.copytree(whole, tmp_path / "bundle"))
    kept: dict[str, bytes] = {}

    def write(name: str, content: bytes) -> Path:
        for other, before in kept.items():
            (copy / other).write_bytes(before)
        kept.clear()
        kept[name] = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        files = {file: FileEntry.of(copy / file) for file in read_manifest(copy).files}
        write_manifest(copy, files)
        return copy

    return write


def outcome(path: Path, runner: str, top_k: int = 0) -> str:
    """The message of the UserError, "" for an image; every other exception fails the test."""
    try:
        with ImageGenerator.from_bundle(path, runner=runner, num_threads=1) as generator:
            image = generator(["a red circle"], top_k=top_k).images[0]
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1500, message
        return message
    assert np.asarray(image).shape == (48, 48, 3)
    return ""


def variants(content: bytes) -> dict[str, bytes]:
    noise = np.random.default_rng(0).bytes(len(content))
    return {
        "empty": b"",
        "random": noise,
        "cut": content[: len(content) * 9 // 10],
        "head": content[:100],
        "zeros": bytes(len(content)),
        "long": content + b"trailing",
        "damaged": content[: len(content) // 2] + noise[:64] + content[len(content) // 2 + 64 :],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GRAPHS, "onnx/evict.onnx", WEIGHTS, "tokenizer.json"])
def test_a_damaged_file_is_one_sentence_or_harmless(
    whole: Path, changed: Callable[[str, bytes], Path], name: str
) -> None:
    refused, is_graph = 0, name.endswith(".onnx")
    for variant, content in variants((whole / name).read_bytes()).items():
        # The torch runner reads no graph: one image shows it.
        for runner in RUNNERS if not is_graph or variant == "random" else ("ort",):
            refused += outcome(changed(name, content), runner, int("top_k" in name)) != ""
    assert refused >= (4 if is_graph else 8)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_in_the_place_of_another_is_refused(
    whole: Path, changed: Callable[[str, bytes], Path], name: str
) -> None:
    for other in GRAPHS:
        if other != name:
            path = changed(name, (whole / other).read_bytes())
            message = outcome(path, "ort", int("top_k" in name))
            assert f"{name} is not the graph that ssd_config.json describes" in message
            assert "export it again" in message


@pytest.mark.parametrize("policy, budget", [("streaming-llm", 0.3), ("h2o", 0.5)])
def test_a_graph_of_another_policy_or_budget_is_refused(
    changed: Callable[[str, bytes], Path], policy: str, budget: float
) -> None:
    other = bundle(checkpoint(TINY), policy, budget)
    path = changed("onnx/decode_step.onnx", (other / "onnx/decode_step.onnx").read_bytes())
    assert "decode_step.onnx is not the graph that ssd_config" in outcome(path, "ort")


def test_weights_of_another_dtype_or_size_are_refused(
    whole: Path, changed: Callable[[str, bytes], Path], tmp_path: Path
) -> None:
    state = load_file(whole / WEIGHTS)
    changes: list[Callable[[np.ndarray], np.ndarray | None]] = [
        lambda value: value.astype(np.float16),
        lambda value: value[..., :-1],
        lambda value: np.concatenate([value, value]),
        lambda value: None,
    ]
    padding = np.zeros(1 << 16, np.float32)  # so that the file is not too short for its tables
    for name in ("language_model.norm.weight", "layers.0.o", "vqmodel.decoder.conv_in.weight"):
        for change in changes:
            other = change(state[name])
            values = {**state, "zz": padding, name: padding if other is None else other}
            values = {n: np.ascontiguousarray(v) for n, v in values.items()}
            if other is None:
                del values[name]
            save_file(values, tmp_path / "w")
            path = changed(WEIGHTS, (tmp_path / "w").read_bytes())
            message = outcome(path, "torch")
            assert "does not hold the weights that ssd_config.json describes" in message


def test_a_tokenizer_with_ids_beyond_the_table_is_refused(
    whole: Path, changed: Callable[[str, bytes], Path]
) -> None:
    spec = json.loads((whole / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 10**6, "content": "<far>"})
    for runner in RUNNERS:
        message = outcome(changed("tokenizer.json", json.dumps(spec).encode()), runner)
        assert "tokenizer.json has ids up to" in message


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 9}] * 40},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 10**6},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 30},
        {"type": "Precompiled", "precompiled_charsmap": ""},
        {"type": "Unheard"},
        "NFC",
    ],
)
def test_a_normalizer_that_multiplies_its_input_never_runs(
    whole: Path, changed: Callable[[str, bytes], Path], normalizer: object
) -> None:
    """Two doublings after another forty times took all memory, and Rust ended the process."""
    spec = json.loads((whole / "tokenizer.json").read_text())
    path = changed("tokenizer.json", json.dumps({**spec, "normalizer": normalizer}).encode())
    assert "normalizer" in outcome(path, "ort")


def test_dropout_is_refused(whole: Path, changed: Callable[[str, bytes], Path]) -> None:
    spec = json.loads((whole / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.5
    path = changed("tokenizer.json", json.dumps(spec).encode())
    assert "dropout is 0.5" in outcome(path, "ort")
