"""Tensors that the model would use are exported or refused by name; the others are listed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from tests.janus_checkpoints import (
    TinyJanus,
    write_original_checkpoint,
    write_transformers_checkpoint,
)

ATTENTION = "model.language_model.layers.1.self_attn."
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers_checkpoint(tmp_path_factory.mktemp("source") / "tiny", TinyJanus())


@pytest.fixture
def variant(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the checkpoint with tensors changed, and fields of config.json."""

    def write(change: Callable[[State], Any] = lambda state: None, **config: Any) -> Path:
        state = load_file(source / "model.safetensors")
        change(state)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((source / "config.json").read_text())
        for name, value in config.items():
            section, _, field = name.partition("__")
            if field:
                values[section][field] = value
            else:
                values[section] = value
        (tmp_path / "config.json").write_text(json.dumps(values))
        (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        return tmp_path

    return write


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message


def adding(*names: str, shape: tuple[int, ...] = (64,)) -> Callable[[State], None]:
    return lambda state: state.update({name: torch.ones(shape) for name in names})


@pytest.mark.parametrize(
    "name",
    [
        *(f"{ATTENTION}{part}_proj.bias" for part in "qkvo"),
        *(f"{ATTENTION}{part}_norm.weight" for part in "qk"),
        "model.language_model.layers.0.mlp.down_proj.bias",
        "model.language_model.layers.0.post_feedforward_layernorm.weight",
        "model.language_model.norm.bias",
        "model.generation_embeddings.bias",
        "model.generation_aligner.hidden_layers.1.weight",
        "model.generation_head.norm.weight",
        "model.generation_head.vision_head.modules_to_save.default.weight",
        "model.vqmodel.post_quant_conv.scale",
        "model.vqmodel.decoder.up.0.block.0.conv_shortcut.weight",
        "model.vqmodel.decoder.up.0.upsample.norm.weight",
        "model.vqmodel.quantize.projection.weight",
    ],
)
def test_a_tensor_that_would_be_used_is_refused_by_name(
    variant: Callable[..., Path], name: str
) -> None:
    refused(variant(adding(name)), name, "[64]", "leave it out")


@pytest.mark.parametrize(
    "names",
    [
        [f"{ATTENTION}q_proj.lora_A.weight", f"{ATTENTION}q_proj.lora_B.weight"],
        [f"{ATTENTION}q_proj.lora_A.default.weight"],
        [f"{ATTENTION}v_proj.lora_magnitude_vector.default.weight"],
        ["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"],
        [f"{ATTENTION}q_proj.base_layer.weight"],
    ],
)
def test_lora_beside_its_base_is_refused_with_the_way_to_merge_it(
    variant: Callable[..., Path], names: list[str]
) -> None:
    refused(variant(adding(*names)), names[0], "LoRA", "merge_and_unload")


def test_an_adapter_beside_the_weights_is_refused(variant: Callable[..., Path]) -> None:
    path = variant()
    (path / "adapter_config.json").write_text("{}")
    refused(path, "LoRA adapter", "--lora")


def test_more_layers_than_config_says(variant: Callable[..., Path]) -> None:
    path = variant(text_config__num_hidden_layers=1)
    refused(path, "weights of layer 1", "config.json has only 1 layers")


def test_what_understanding_needs_is_listed_in_one_line(variant: Callable[..., Path]) -> None:
    """Images, text and derived buffers have no part in generation."""
    path = variant(
        adding(
            "model.vision_model.more.weight",
            "lm_head.bias",
            "model.language_model.rotary_emb.inv_freq",
            "model.language_model.layers.0.self_attn.rotary_emb.inv_freq",
            "something.new",
        )
    )
    line = open_checkpoint(path).left_out
    for kind in ("aligner (4)", "lm_head (1)", "vqmodel.encoder (", "something (1)"):
        assert kind in line
    assert "vision_model (" in line and "language_model.rotary_emb (1)" in line


def test_both_layouts_list_the_same(variant: Callable[..., Path], tmp_path: Path) -> None:
    original = open_checkpoint(write_original_checkpoint(tmp_path / "original", TinyJanus()))
    transformers = open_checkpoint(variant())
    for line in (original.left_out, transformers.left_out):
        assert "aligner (4)" in line and "vqmodel.encoder (60), vqmodel.quant_conv (2)" in line
    assert "lm_head (1)" in original.left_out  # tied in the other layout, and stored once


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper_is_named(variant: Callable[..., Path], prefix: str) -> None:
    def wrap(state: State) -> None:
        wrapped = {f"{prefix}{name}": value for name, value in state.items()}
        state.clear()
        state.update(wrapped)

    refused(variant(wrap), "it is there as " + prefix, f"without {prefix!r}")


def test_a_tensor_that_is_there_twice(variant: Callable[..., Path]) -> None:
    name = "language_model.norm.weight"
    refused(variant(adding(name)), "twice", name, f"model.{name}", "model.safetensors")


QUANTIZED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
    ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
    ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
    ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8, e4m3"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ({"something": 1}, "no method named"),
    ("int4", "int4"),
]


@pytest.mark.parametrize("values, words", QUANTIZED)
@pytest.mark.parametrize("section", ["", "text_config"])
def test_quantized_checkpoints_are_answered_from_config_json(
    variant: Callable[..., Path], values: Any, words: str, section: str
) -> None:
    name = "text_config__quantization_config" if section else "quantization_config"
    path = variant(lambda state: state.clear(), **{name: copy.deepcopy(values)})
    refused(path, "quantized already", words, "--weights int8, int4 or fp8", "Janus-Pro-1B")


def test_a_quantizers_own_file_is_read_where_config_json_is_silent(
    variant: Callable[..., Path],
) -> None:
    path = variant()
    values = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (path / "hf_quant_config.json").write_text(json.dumps(values))
    refused(path, "hf_quant_config.json", "NVFP4")


@pytest.mark.parametrize(
    "suffix, method",
    [("qweight", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"), ("weight_scale_inv", "fp8")],
)
def test_the_names_of_quantized_tensors_speak_for_themselves(
    variant: Callable[..., Path], suffix: str, method: str
) -> None:
    refused(variant(adding(f"{ATTENTION}q_proj.{suffix}")), f"q_proj.{suffix}", method)


def test_no_quantization_config_is_none(variant: Callable[..., Path]) -> None:
    assert open_checkpoint(variant(quantization_config=None)).config.num_layers == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_codes_in_place_of_weights_are_refused_before_anything_is_read(
    variant: Callable[..., Path], dtype: torch.dtype
) -> None:
    name = "model.language_model.norm.weight"
    path = variant(lambda state: state.update({name: state[name].to(dtype)}))
    refused(path, name, str(dtype).removeprefix("torch."), "float weights")
