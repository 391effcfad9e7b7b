"""Checkpoints of both layouts: the same names, tensors and numbers; heads permuted; memory given
back.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssd_export.errors import UserError
from ssd_export.model import pickled_weights
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint, permute_heads
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import PUBLISHED
from ssd_export.model.families.janus import read_original_config, read_transformers_config
from tests.janus_checkpoints import (
    TinyJanus,
    build_model,
    write_original_checkpoint,
    write_transformers_checkpoint,
)

TINY = TinyJanus(num_layers=2, num_heads=6, num_kv_heads=3, hidden_size=96)


@pytest.fixture(scope="module", params=[False, True], ids=["single", "sharded"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Checkpoint]:
    root = tmp_path_factory.mktemp("checkpoints")
    write_transformers_checkpoint(root / "transformers", TINY, sharded=request.param)
    write_original_checkpoint(root / "original", TINY, sharded=request.param)
    assert bool(list(root.glob("*/*.index.json"))) == request.param
    return open_checkpoint(root / "transformers"), open_checkpoint(root / "original")


def test_both_layouts_are_the_same_checkpoint(both: tuple[Checkpoint, Checkpoint]) -> None:
    transformers, original = both
    assert (transformers.layout, original.layout) == ("transformers", "original")
    assert transformers.config == original.config
    assert transformers.names() == original.names()
    truth = {
        name.removeprefix("model."): value for name, value in build_model(TINY).state_dict().items()
    }
    for name in transformers.names():
        assert torch.equal(transformers.tensor(name), truth[name]) and torch.equal(
            original.tensor(name), truth[name]
        )
        assert transformers.shape(name) == tuple(truth[name].shape)
    assert transformers.fingerprint() == original.fingerprint()


def test_the_fingerprint_sees_a_changed_layer(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    other = write_transformers_checkpoint(tmp_path, TinyJanus(**{**TINY.__dict__, "seed": 5}))
    assert open_checkpoint(other).fingerprint() != both[0].fingerprint()


def test_tensors_outlive_the_mapping(
    both: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled_weights, "COPY_BYTES", 256)  # a tensor is copied in many pieces
    for checkpoint in both:
        name = checkpoint.names()[0]
        first = checkpoint.tensor(name)
        kept = first.clone()
        for other in checkpoint.names()[:10]:
            checkpoint.tensor(other)
        assert torch.equal(first, kept) and torch.equal(checkpoint.tensor(name), kept)


def test_llama_defaults_where_the_original_7b_config_is_silent() -> None:
    names_only = {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "vocab_size": 102400,
    }
    shapes = {
        "vqmodel.post_quant_conv.weight": (256, 8, 1, 1),
        "vqmodel.decoder.conv_out.weight": (3, 128, 3, 3),
        **{
            f"vqmodel.decoder.up.{i}.block.0.conv1.weight": (w, 1, 3, 3)
            for i, w in enumerate((512, 256, 256, 128, 128))
        },
        **{f"vqmodel.decoder.up.0.block.{i}.conv1.weight": (512, 512, 3, 3) for i in range(3)},
    }
    file = ConfigFile(
        Path("config.json"),
        {
            "model_type": "multi_modality",
            "language_config": names_only,
            "gen_vision_config": {
                "cls": "VQ-16",
                "params": {"image_token_size": 16384, "n_embed": 8},
            },
        },
    )
    config = read_original_config(file, shapes)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (
        30,
        4096,
        32,
        32,
    )
    assert (config.head_dim, config.intermediate_size, config.rope_theta) == (128, 11008, 10000.0)
    assert (config.rms_norm_eps, config.max_positions, config.vocab_size) == (1e-6, 16384, 102400)
    assert (config.vq.channel_multipliers, config.vq.base_channels) == ((1, 1, 2, 2, 4), 128)
    assert (config.vq.num_res_blocks, config.vq.latent_channels, config.image_width) == (
        2,
        256,
        384,
    )


def test_a_transformers_config_of_before_version_5(both: tuple[Checkpoint, Checkpoint]) -> None:
    values = json.loads((both[0].path / "config.json").read_text())
    text = values["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    text |= {"rope_theta": theta, "rope_scaling": None}
    read = read_transformers_config(ConfigFile(Path("config.json"), values), {})
    assert read == both[0].config


def test_bfloat16_weights_stay_bfloat16(tmp_path: Path) -> None:
    write_original_checkpoint(tmp_path, TINY)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(
        {name: value.bfloat16() for name, value in state.items()}, tmp_path / "pytorch_model.bin"
    )
    checkpoint = open_checkpoint(tmp_path)
    assert all(checkpoint.tensor(name).dtype == torch.bfloat16 for name in checkpoint.names())
    assert len(checkpoint.fingerprint()) == 64


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_tied_text_embedding_under_its_other_name(tmp_path: Path, layout: str) -> None:
    """Tied weights are stored under one name, which may be the text head's."""
    if layout == "original":
        write_original_checkpoint(tmp_path, TINY)
        file = tmp_path / "pytorch_model.bin"
        state = torch.load(file, weights_only=True)
        head, embedding = (
            "language_model.lm_head.weight",
            "language_model.model.embed_tokens.weight",
        )
    else:
        write_transformers_checkpoint(tmp_path, TINY)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    state[head] = state.pop(embedding)
    torch.save(state, file) if layout == "original" else save_file(state, file)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("language_model.embed_tokens.weight"), state[head])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(UserError, match="lacks the tensor language_model.embed_tokens.weight"):
        open_checkpoint(tmp_path)


def test_the_fingerprint_survives_a_save_that_loses_nothing(tmp_path: Path) -> None:
    """Another dtype that holds the same numbers, another format, other files."""
    write_transformers_checkpoint(tmp_path, TINY)
    file = tmp_path / "model.safetensors"
    exact = open_checkpoint(tmp_path).fingerprint()
    halves = {name: value.bfloat16() for name, value in load_file(file).items()}
    prints = set()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        save_file({name: value.to(dtype) for name, value in halves.items()}, file)
        prints.add(open_checkpoint(tmp_path).fingerprint())
    file.unlink()
    torch.save(halves, tmp_path / "pytorch_model.bin")
    prints.add(open_checkpoint(tmp_path).fingerprint())
    assert len(prints) == 1 and exact not in prints


def test_permuted_heads_compute_the_same(both: tuple[Checkpoint, Checkpoint]) -> None:
    checkpoint = both[0]
    head_order = ((2, 0, 1), (1, 2, 0))
    seen: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}
    outputs = {
        permuted: _run(checkpoint, head_order if permuted else None, seen[permuted])
        for permuted in seen
    }
    torch.testing.assert_close(outputs[True], outputs[False], rtol=1e-4, atol=1e-4)
    assert torch.equal(
        seen[True][0], seen[False][0][:, list(head_order[0])]
    )  # layer 0 has equal inputs


def test_permute_heads_leaves_the_rest_alone(both: tuple[Checkpoint, Checkpoint]) -> None:
    config = both[0].config
    for name in both[0].names():
        tensor = both[0].tensor(name)
        moved = permute_heads(name, tensor, ((2, 0, 1), (0, 1, 2)), config)
        assert torch.equal(moved, tensor) != ("layers.0.self_attn" in name)
    with pytest.raises(ValueError, match="no permutation"):
        permute_heads(
            "language_model.layers.0.self_attn.q_proj.weight",
            torch.zeros(96, 96),
            ((0, 0, 1),),
            config,
        )


@torch.no_grad()
def _run(
    checkpoint: Checkpoint, head_order: tuple[tuple[int, ...], ...] | None, seen: dict[int, Tensor]
) -> Tensor:
    """Logits of 12 image tokens; seen: the keys of each layer."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen[layer] = key
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    model = ImageTokenModel(checkpoint.config).eval()
    weights = {name: checkpoint.tensor(name) for name in model.state_dict()}
    if head_order:
        weights = {
            name: permute_heads(name, w, head_order, checkpoint.config)
            for name, w in weights.items()
        }
    model.load_state_dict(weights, strict=True)
    tokens = torch.arange(24).reshape(2, 12)
    hidden = model(model.embed_image_tokens(tokens), torch.arange(12).expand(2, -1), attend)
    return model.image_logits(hidden)


def test_a_look_alike_is_known_by_its_folder_and_its_repository(tmp_path: Path) -> None:
    config = PUBLISHED["janus-pro-1b"]
    cache = tmp_path / "models--deepseek-ai--Janus-1.3B" / "snapshots" / "0123abcd"
    for folder, is_assumed in (
        (tmp_path / "Janus-1.3B", False),
        (cache, False),
        (tmp_path / "models--deepseek-ai--Janus-Pro-1B" / "snapshots" / "0123abcd", True),
        (tmp_path / "my-fine-tune", True),
    ):
        found = Checkpoint(folder, "original", config, {}).head_map()
        assert (found is not None and bool(found.assumed)) == is_assumed, folder


@pytest.mark.parametrize("how", ["by its name", "by its prompts"])
def test_a_look_alike_is_refused_a_built_in_map(tmp_path: Path, how: str) -> None:
    config, folder = PUBLISHED["janus-pro-1b"], tmp_path / "Janus-1.3B"
    if how == "by its prompts":
        config, folder = replace(config, prompt_template="janus"), tmp_path / "model"
    checkpoint = Checkpoint(folder, "original", config, {})
    assert checkpoint.head_map() is None
    with pytest.raises(UserError, match="calibrate.*--policy h2o"):
        checkpoint.head_map("janus-pro-1b")
    with pytest.raises(UserError, match="calibrate"):
        checkpoint.head_map("janus-pro-7b")  # of another shape
    asked = Checkpoint(tmp_path / "tuned", "original", PUBLISHED["janus-pro-1b"], {})
    assert asked.head_map("janus-pro-1b").assumed
