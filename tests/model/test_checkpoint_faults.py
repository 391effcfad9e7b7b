"""Every fault of a checkpoint ends in one line that names it; nothing of a pickle is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import time
import zipfile
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
from tests.unprivileged import error_without_rights

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
    assert "\n" not in message and len(message) < 600, message
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


def test_quantized_weights(copy: Callable[[str], Path]) -> None:
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


HUGE = [10**12, 10**19, 2**63, 10**400]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "section, field",
    [
        ("text_config", "num_hidden_layers"),
        ("text_config", "hidden_size"),
        ("text_config", "vocab_size"),
        ("text_config", "num_attention_heads"),
        ("text_config", "num_key_value_heads"),
        ("text_config", "head_dim"),
        ("text_config", "intermediate_size"),
        ("text_config", "max_position_embeddings"),
        ("vq_config", "num_embeddings"),
        ("vq_config", "embed_dim"),
        ("vq_config", "num_res_blocks"),
        ("vq_config", "base_channels"),
        ("vq_config", "latent_channels"),
        ("vq_config", "out_channels"),
        ("vq_config", "channel_multiplier"),
    ],
)
def test_numbers_that_no_file_can_hold(
    copy: Callable[[str], Path], section: str, field: str, value: int
) -> None:
    """Refused before anything of that size is built: a count of layers never ended."""
    path = copy("transformers")
    given: Any = [value] if field == "channel_multiplier" else value
    edit_json(path / "config.json", lambda values: values[section].update({field: given}))
    began = time.process_time()
    if field == "max_position_embeddings":
        assert open_checkpoint(path).config.max_positions == value
    else:
        refused(path, "config.json")
    assert time.process_time() - began < 5


def test_a_hundred_thousand_levels(copy: Callable[[str], Path]) -> None:
    path = copy("transformers")
    levels = [1] * 100_000
    edit_json(
        path / "config.json", lambda values: values["vq_config"].update(channel_multiplier=levels)
    )
    refused(path, "levels")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_json_nested_a_hundred_thousand_deep(copy: Callable[[str], Path], name: str) -> None:
    path = copy("transformers")
    if "index" in name:
        (path / "model.safetensors").unlink()
    (path / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    refused(path, name, "nested too deeply" if name != "tokenizer.json" else "download it again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_a_folder_or_a_dead_link_in_place_of_a_file(
    copy: Callable[[str], Path], name: str
) -> None:
    """None of them is waited for, and none is called truncated."""
    path = copy("transformers")
    makers: list[Callable[[Path], object]] = [
        os.mkfifo,
        lambda file: file.mkdir(),
        lambda file: file.symlink_to("nothing"),
        lambda file: file.symlink_to(file.name),
    ]
    for make in makers:
        (path / name).rename(path / "kept")
        make(path / name)
        refused(path)
        (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()
        (path / "kept").rename(path / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", ""])
def test_what_one_may_not_read_is_not_called_truncated(pristine: Path, name: str) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        path = root / "model"
        shutil.copytree(pristine / "transformers", path)
        for folder in (root, path):
            folder.chmod(0o755)
        for file in path.iterdir():
            file.chmod(0o644)
        (path / name).chmod(0)
        message = error_without_rights(lambda: open_checkpoint(path))
        assert f"{path / name}" in message and "Permission denied; run as a user who" in message
        assert "truncated" not in message and "download" not in message
    finally:
        shutil.rmtree(root)


def test_a_shard_name_of_five_thousand_letters(copy: Callable[[str], Path]) -> None:
    path = copy("original-sharded")
    index = path / "pytorch_model.bin.index.json"
    for name in ("x" * 5000 + ".bin", "x" * 300 + ".bin", "nu\0ll.bin", ".bin", "con.bin/"):
        edit_json(index, lambda values, name=name: values.update(weight_map={"a": name}))
        refused(path)


def test_a_single_file_beside_an_index(copy: Callable[[str], Path]) -> None:
    path = copy("transformers")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    refused(path, "holds both", "delete")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda norm: {1: norm}, ["under 1", "no name"]),
        (lambda norm: {("a", "b"): norm}, ["no name"]),
        (lambda norm: {None: norm}, ["no name"]),
        (lambda norm: {"a": norm.to_sparse()}, ["a is no plain tensor (sparse"]),
        (lambda norm: {"a": torch.empty(5, device="meta")}, ["no plain tensor (meta"]),
        (lambda norm: {"a": torch.zeros(1).expand(1 << 40)}, ["no plain tensor"]),
        (lambda norm: {"a": torch.quantize_per_tensor(norm, 1.0, 0, torch.qint8)}, ["a"]),
        (lambda norm: {"state_dict": {"a": norm}}, ["under 'state_dict'"]),
        (lambda norm: {"x" * 9999: norm.to_sparse()}, ["no plain tensor"]),
        (lambda norm: {}, ["no tensors by name"]),
    ],
)
def test_pickles_of_other_things(
    copy: Callable[[str], Path], make: Callable[[torch.Tensor], Any], words: list[str]
) -> None:
    path = copy("original")
    torch.save(make(torch.ones(4)), path / "pytorch_model.bin")
    refused(path, "pytorch_model.bin", *words)


def test_a_pickle_that_grows_when_it_is_unpacked(copy: Callable[[str], Path]) -> None:
    path = copy("original")
    with zipfile.ZipFile(path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    refused(path, "compressed")


@pytest.mark.parametrize("position", [0.02, 0.3, 0.97])
def test_a_damaged_pickle_is_not_called_code(copy: Callable[[str], Path], position: float) -> None:
    """Random bytes in the index of a torch file: one line, and nothing about running code."""
    path = copy("original")
    with zipfile.ZipFile(path / "pytorch_model.bin") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    at = int(len(entries[name]) * position)
    entries[name] = entries[name][:at] + b"\xff\x00\xee" + entries[name][at + 3 :]
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    refused(path, "pytorch_model.bin")
