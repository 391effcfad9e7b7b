"""LlamaGen in torch and ONNX Runtime against the oracle of tests/llamagen_checkpoints.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.export.exporter import ExportSpec, export_bundle, settle_policy
from ssd_export.model.checkpoint import ShapeOnly, open_checkpoint
from ssd_export.model.families import PUBLISHED, prompt_encoder
from ssd_export.model.prompt import Prompt
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.runtime.runners import open_runner
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint
from tests.llamagen_checkpoints import Oracle, TinyLlamaGen, write_llamagen_checkpoint

CASES = {
    "classes": TinyLlamaGen(),
    "gqa": TinyLlamaGen(num_kv_heads=2, num_layers=3),
    "captions": TinyLlamaGen(caption_dim=24),
    "no guidance": TinyLlamaGen(has_null=False),
    "larger grid": TinyLlamaGen(side=24, num_layers=1),
}
NUM_CLASSES = 10
TOLERANCE = 1e-4


def prompts_of(tiny: TinyLlamaGen) -> list[Prompt]:
    if not tiny.caption_dim:
        return ["3", "9"]
    rng = np.random.default_rng(1)
    return [rng.standard_normal((tokens, tiny.caption_dim), np.float32) for tokens in (5, 12)]


def expected(
    tiny: TinyLlamaGen, prompts: list[Prompt], cfg_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [N, I] and the logits [rows, I, V] behind them."""
    oracle = Oracle(tiny)
    condition, mask = (
        oracle.caption_condition([torch.from_numpy(prompt) for prompt in prompts])
        if tiny.caption_dim
        else oracle.class_condition([int(prompt) for prompt in prompts])
    )
    tokens = oracle.greedy(condition, mask, cfg_scale, COUNT)
    rows = len(condition) // len(prompts)
    return tokens.numpy(), oracle.logits(condition, mask, tokens[:, :-1].repeat(rows, 1)).numpy()


COUNT = 40  # tokens: more than two rows of the smaller grid


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TinyLlamaGen, Bundle]]:
    tiny = CASES[request.param]
    folder = tmp_path_factory.mktemp("llamagen")
    classes = {} if tiny.caption_dim else {"num_classes": NUM_CLASSES}
    model = write_llamagen_checkpoint(folder / "model", tiny, **classes)
    spec = ExportSpec(str(model), policy="full", budget=1.0, out=folder / "bundle")
    yield tiny, open_bundle(export_bundle(spec))


@pytest.mark.parametrize("runner_name", ["torch", "ort"])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_greedy_tokens_and_logits_are_the_oracles(
    case: tuple[TinyLlamaGen, Bundle], runner_name: str, cfg_scale: float
) -> None:
    tiny, bundle = case
    cfg_scale = cfg_scale if tiny.has_null else 1.0
    prompts = prompts_of(tiny)
    tokens, logits = expected(tiny, prompts, cfg_scale)
    sampling = Sampling(cfg_scale=cfg_scale, temperature=0.0)
    batch = PromptBatches.from_bundle(bundle)(prompts, sampling, seed=0)
    table = bundle.config.policy
    runner = open_runner(bundle, runner_name, "cpu", 1)
    steps = [range(step, step + 1) for step in range(1, COUNT)]
    for taken in decode(runner, batch, table, steps):
        step = taken.stop - 1 if taken.start else 0
        assert np.abs(runner.logits() - logits[:, step]).max() <= TOLERANCE, step
    assert len(set(tokens.ravel().tolist())) > COUNT / 2
    np.testing.assert_array_equal(runner.tokens()[:, :COUNT], tokens)
    runner.close()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"n_head": None}, "neither gpt_model nor n_head"),
        ({"gpt_model": "GPT-B"}, r"gpt_model is 'GPT-B', expected one of 2 layers of width 64"),
        ({"gpt_model": "GPT-5"}, "expected GPT-B or GPT-L"),
        ({"n_head": 5}, "n_head is 5, expected heads of a multiple of 4"),
        ({"image_size": None}, "has no image_size"),
        ({"image_size": 33}, "image_size is 33, expected a multiple of the 2 pixels"),
        ({"downsample_size": 16}, "downsample_size is 16, expected 2"),
        ({"num_classes": 1000}, "num_classes is 1000, expected 10, or 11 without guidance"),
        ({"cls_token_num": 120}, "cls_token_num is 120, expected 1"),
        ({"model_type": "janus"}, "lacks the tensor"),
    ],
)
def test_a_config_that_is_not_the_weights_own_is_refused(
    tmp_path: Path, said: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_checkpoint(write_llamagen_checkpoint(tmp_path, TinyLlamaGen(), **said))


def test_weights_of_janus_under_a_config_of_llamagen_are_refused(tmp_path: Path) -> None:
    folder = write_transformers_checkpoint(tmp_path, TinyJanus(num_layers=1))
    said = {"model_type": "llamagen", "n_head": 4, "image_size": 48}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="give a complete LlamaGen checkpoint"):
        open_checkpoint(folder)


def test_weights_of_256_tokens_with_a_grid_of_576_are_refused(tmp_path: Path) -> None:
    folder = write_llamagen_checkpoint(tmp_path, TinyLlamaGen(), image_size=48)
    assert open_checkpoint(folder).config.grid.num_tokens == 576  # nothing tells otherwise
    weights = folder / "c2i_B_tiny.pt"
    state = torch.load(weights)["model"]
    torch.save({"model": {**state, "freqs_cis": torch.zeros(257, 8, 2)}}, weights)
    with pytest.raises(UserError, match=r"24 x 24 tokens, and .* trained on 256 \(freqs_cis\)"):
        open_checkpoint(folder)
    torch.save({"model": state}, weights)
    weights.rename(folder / "c2i_B_256.pt")
    with pytest.raises(UserError, match='image_size is 48, .* named for 256: write "image_size"'):
        open_checkpoint(folder)


def test_the_transformer_without_the_image_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_llamagen_checkpoint(tmp_path, TinyLlamaGen())
    (folder / "vq_ds16_tiny.pt").unlink()
    with pytest.raises(UserError, match="vq_ds16"):
        open_checkpoint(folder)


def test_names_of_classes_are_as_many_as_the_classes(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(10)]
    folder = write_llamagen_checkpoint(tmp_path, TinyLlamaGen(), class_names=names)
    checkpoint = open_checkpoint(folder)
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    assert encoder.encode(["class 7"], 1).ids.tolist() == [[7], [10]]
    write_llamagen_checkpoint(tmp_path, TinyLlamaGen(), class_names=names[:9])
    with pytest.raises(UserError, match="class_names has 9 names, and the weights have 10"):
        open_checkpoint(folder)


def test_guidance_of_a_model_without_a_null_class_is_refused(tmp_path: Path) -> None:
    tiny = TinyLlamaGen(has_null=False, num_layers=1)
    model = write_llamagen_checkpoint(tmp_path / "model", tiny, num_classes=NUM_CLASSES)
    spec = ExportSpec(str(model), policy="h2o", budget=0.2, out=tmp_path / "bundle")
    batches = PromptBatches.from_bundle(open_bundle(export_bundle(spec)))
    with pytest.raises(UserError, match="no guidance: use --cfg-scale 1"):
        batches(["3"], Sampling(cfg_scale=4.0), seed=0)


def test_published_shapes_are_those_of_the_paper() -> None:
    sizes = {"b": 111, "l": 343, "xl": 775, "xxl": 1400, "3b": 3100}  # million parameters
    for name, millions in sizes.items():
        shape = ShapeOnly(PUBLISHED[f"llamagen-c2i-{name}-384"])
        numbers = sum(
            torch.Size(shape.shape(tensor)).numel()
            for tensor in shape.names()
            if not tensor.startswith("vqmodel.")
        )
        assert abs(numbers / 1e6 / millions - 1) < 0.02, name


def test_no_built_in_head_map_is_assumed_for_it() -> None:
    shape = ShapeOnly(PUBLISHED["llamagen-c2i-l-384"])
    assert shape.head_map() is None
    with pytest.raises(UserError, match="calibrate"):
        settle_policy(ExportSpec(policy="ssd-row"), shape)
    with pytest.raises(UserError, match="for another model: family"):
        shape.head_map("janus-pro-1b")
