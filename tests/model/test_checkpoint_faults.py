"""Every fault of a checkpoint ends in one line that names it; nothing of a pickle is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from tests.janus_checkpoints import (
    TinyJanus,
    write_original_checkpoint,
    write_transformers_checkpoint,
)

NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write_transformers_checkpoint(root / "transformers", TinyJanus())
    write_transformers_checkpoint(root / "transformers-sharded", TinyJanus(), sharded=True)
    write_original_checkpoint(root / "original", TinyJanus())
    write_original_checkpoint(root / "original-sharded", TinyJanus(), sharded=True)
    return root


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(pristine / kind, tmp_path / kind))


def refused(path: Path, *words: str) -> None:
    """open_checkpoint, or reading all of it, fails with one line that has all the words."""
    with pytest.raises(UserError) as error:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    if (directory / "model.safetensors").is_file():
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        state = torch.load(directory / "pytorch_model.bin", weights_only=True)
        change(state)
        torch.save(state, directory / "pytorch_model.bin")


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no checkpoint at", "nowhere")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "no checkpoint at")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(copy: Callable[[str], Path], name: str) -> None:
    path = copy("transformers")
    (path / name).unlink()
    refused(path, name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"null"])
def test_a_damaged_config(copy: Callable[[str], Path], content: bytes) -> None:
    path = copy("original")
    (path / "config.json").write_bytes(content)
    refused(path, "config.json")


@pytest.mark.parametrize("kind", ["transformers-sharded", "original-sharded"])
def test_a_missing_shard(copy: Callable[[str], Path], kind: str) -> None:
    path = copy(kind)
    shard = sorted(path.glob("*-00002-of-*"))[0]
    shard.unlink()
    refused(path, "lacks the shard", shard.name)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 3}, {"a": "../../etc/passwd"}, {"a": "/etc/model.bin"}, {}]
)
def test_a_damaged_index(copy: Callable[[str], Path], weight_map: Any) -> None:
    path = copy("original-sharded")
    edit_json(
        path / "pytorch_model.bin.index.json", lambda values: values.update(weight_map=weight_map)
    )
    refused(path)


@pytest.mark.parametrize("kind", ["transformers", "original"])
@pytest.mark.parametrize("kept", [0, 10, 3000, -1])
def test_truncated_weights(copy: Callable[[str], Path], kind: str, kept: int) -> None:
    path = copy(kind)
    file = path / ("model.safetensors" if kind == "transformers" else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:kept])
    refused(path, file.name, "truncated")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_never_run(
    copy: Callable[[str], Path], zipped: bool, tmp_path: Path
) -> None:
    path, target = copy("original"), tmp_path / "ran"
    if zipped:
        edit_weights(path, lambda state: state.update(bomb=Bomb(target)))
    else:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps({"bomb": Bomb(target)}))
    refused(path, "pytorch_model.bin")
    assert not target.exists()


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), {"a": 1}])
def test_a_pickle_without_named_tensors(copy: Callable[[str], Path], content: Any) -> None:
    path = copy("original")
    torch.save(content, path / "pytorch_model.bin")
    refused(path)


def test_a_git_lfs_pointer(copy: Callable[[str], Path]) -> None:
    path = copy("transformers")
    (path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    refused(path, "git lfs pull")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "hidden_size": 64},
        {"model_type": ["janus"]},
        {"hidden_size": 64},
        {"model_type": "multi_modality", "language_config": {}},  # JanusFlow
    ],
)
def test_a_foreign_checkpoint(copy: Callable[[str], Path], values: dict[str, Any]) -> None:
    path = copy("transformers")
    (path / "config.json").write_text(json.dumps(values))
    refused(path, "Janus-Pro")


def test_llama_weights_under_a_janus_config(copy: Callable[[str], Path]) -> None:
    for kind in ("transformers", "original"):
        path = copy(kind)
        edit_weights(
            path,
            lambda state: [
                state.pop(name) for name in list(state) if "gen" in name or "vq" in name
            ],
        )
        refused(path, "lacks")


@pytest.mark.parametrize(
    "kind, stored", [("transformers", NORM), ("original", "gen_head.vision_head.bias")]
)
def test_a_missing_tensor(copy: Callable[[str], Path], kind: str, stored: str) -> None:
    path = copy(kind)
    edit_weights(path, lambda state: state.pop(stored))
    refused(path, "lacks the tensor", stored.split(".", 1)[1])


@pytest.mark.parametrize(
    "kind, stored", [("transformers", NORM), ("original", "gen_vision_model.decoder.mid.1.q.bias")]
)
def test_a_wrong_shape(copy: Callable[[str], Path], kind: str, stored: str) -> None:
    path = copy(kind)
    edit_weights(path, lambda state: state.update({stored: torch.zeros(7)}))
    refused(
        path, "shape [7], expected [", "weight" if kind == "transformers" else "mid.attn_1.q.bias"
    )


@pytest.mark.parametrize(
    "kind, stored", [("transformers", NORM), ("original", "language_model.model.norm.weight")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(
    copy: Callable[[str], Path], kind: str, stored: str, value: float
) -> None:
    path = copy(kind)
    edit_weights(path, lambda state: state[stored].__setitem__(5, value))
    refused(path, stored, "NaN" if value != value else f"infinite value ({value})", "download")


def test_quantised_weights(copy: Callable[[str], Path]) -> None:
    path = copy("transformers")
    edit_weights(path, lambda state: state.update({NORM: state[NORM].to(torch.int8)}))
    refused(path, NORM, "int8")


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("text_config", "hidden_size", "64"),
        ("text_config", "hidden_size", 128),
        ("text_config", "num_hidden_layers", 0),
        ("text_config", "num_hidden_layers", 3),
        ("text_config", "num_attention_heads", True),
        ("text_config", "num_key_value_heads", 3),
        ("text_config", "head_dim", 15),
        ("text_config", "rms_norm_eps", -1.0),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "attention_bias", True),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("vq_config", "channel_multiplier", []),
        ("vq_config", "base_channels", 33),
        ("vq_config", "num_hidden_layers", 3),
        ("vision_config", "num_image_tokens", 256),
    ],
)
def test_a_config_that_does_not_fit(
    copy: Callable[[str], Path], section: str, field: str, value: Any
) -> None:
    path = copy("transformers")
    edit_json(path / "config.json", lambda values: values[section].update({field: value}))
    refused(path)


def test_a_tokenizer_with_more_ids_than_embeddings(copy: Callable[[str], Path]) -> None:
    path = copy("transformers")
    tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    extra = {**tokens[-1], "id": tokens[-1]["id"] + 1, "content": "<extra>"}
    edit_json(path / "tokenizer.json", lambda values: values["added_tokens"].append(extra))
    refused(path, "tokenizer.json", "embeddings")
