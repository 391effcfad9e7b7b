"""Classes and embedded captions on the command line, from checkpoint to image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ssd_export.policy.head_map import HeadMap
from tests.janus_checkpoints import TinyJanus
from tests.llamagen_checkpoints import TinyLlamaGen, write_llamagen_checkpoint
from tests.runtime.checkpoints import bundle as text_bundle
from tests.runtime.checkpoints import checkpoint

Run = Callable[..., SimpleNamespace]
CLASSES = TinyLlamaGen(num_layers=1)
CAPTIONS = TinyLlamaGen(num_layers=1, caption_dim=24)


@pytest.mark.parametrize("is_class", [True, False], ids=["classes", "captions"])
def test_a_class_is_a_number_and_a_caption_a_file(run: Run, is_class: bool, tmp_path: Path) -> None:
    model, bundle = tmp_path / "model", tmp_path / "bundle"
    write_llamagen_checkpoint(model, CLASSES if is_class else CAPTIONS)
    assert run("export", "--model", model, "--policy", "h2o", "--out", bundle).code == 0
    embeds = tmp_path / "prompts.safetensors"
    save_file({"prompt_embeds": torch.randn(1, 4, 24)}, embeds)
    both = [("--class", 7), ("--prompt-embeds", embeds)]
    given, other = both if is_class else reversed(both)
    out, tokens = tmp_path / "out.png", tmp_path / "tokens.npy"
    done = run("generate", *given, "--bundle", bundle, "--out", out, "--save-tokens", tokens)
    assert done.code == 0, done.err
    assert np.load(tokens).shape == (1, 256)
    text = Image.open(out).text["prompt"]  # type: ignore[attr-defined]
    assert text == ("7" if is_class else "embeddings of 4 tokens")
    refused = run("generate", *other, "--bundle", bundle, "--out", out)
    assert refused.code == 1
    assert ("classes, not embeddings" if is_class else "--class) is for models") in refused.err


def test_one_kind_of_prompts_is_given(run: Run, tmp_path: Path) -> None:
    for given in ((), ("a red circle", "--class", 1)):
        done = run("generate", *given, "--out", tmp_path / "out.png")
        assert done.code == 2 and "--class NUMBER" in done.err


def test_a_model_of_text_has_no_classes(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    done = run(
        "generate",
        "--class",
        1,
        "--bundle",
        text_bundle(checkpoint(TinyJanus(seed=3)), "h2o"),
        "--out",
        out,
    )
    assert done.code == 1 and "give a PROMPT" in done.err


def test_captions_are_calibrated_by_their_embeddings(run: Run, tmp_path: Path) -> None:
    model = write_llamagen_checkpoint(tmp_path / "model", CAPTIONS)
    embeds, other = tmp_path / "p.safetensors", tmp_path / "other.safetensors"
    prompts = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * (6 - n) + [1] * n for n in (4, 6, 5)])
    save_file({"prompt_embeds": prompts, "attention_mask": mask}, embeds)
    save_file({"prompt_embeds": -prompts, "attention_mask": mask}, other)
    asked = ("calibrate", "--model", model, "--num-images", 3, "--costs", "fisher")
    head_map = model / "head_map.json"
    done = run(*asked, "--prompt-embeds", embeds, "--out", head_map, "--plot", "map.png")
    assert done.code == 0, done.err
    assert "rank correlation" in done.out and (tmp_path / "map-attention.png").exists()
    assert run(*asked, "--prompt-embeds", other, "--out", "other.json").code == 0
    first, second = HeadMap.load(head_map), HeadMap.load("other.json")
    assert first.prompts_hash != second.prompts_hash and first.metric != second.metric
    done = run("export", "--model", model, "--policy", "ssd-auto", "--out", "bundle")
    assert done.code == 0, done.err
    done = run("generate", "--prompt-embeds", embeds, "--bundle", "bundle")
    assert done.code == 0, done.err
    for given, complaint in (
        (("--prompts", embeds, "--prompt-embeds", embeds), "say the same thing"),
        ((), "embed-prompts` and give --prompt-embeds"),
    ):
        done = run(*asked, *given, "--out", "third.json")
        assert done.code == 1 and complaint in done.err
