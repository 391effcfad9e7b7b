"""LlamaGen in torch and ONNX Runtime against the oracle of tests/llamagen_checkpoints.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.model.prompt import Prompt
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.runtime.runners import open_runner
from ssd_export.sampling import Sampling
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
