"""The race in the graph and in torch: the same tokens at a real codebook size, any top-k exact, and
draws from softmax."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import NormalDist

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from ssd_export.export.operators import IR_VERSION, OPSET, Operators
from ssd_export.export.sampler import draw_tokens, noise_of_step, num_sorted_input
from ssd_export.graph_spec import NUM_SORTED_CODES
from ssd_export.model.families import PUBLISHED
from ssd_export.noise import GumbelNoise, ImageSeed
from ssd_export.runtime.prompt_batch import sampling_inputs
from ssd_export.runtime.torch_runner import draw_tokens as torch_draw_tokens
from ssd_export.sampling import Sampling

JANUS_CODEBOOK = 16_384
IMAGES = 8
ROWS = 3  # of noise
RNG = np.random.default_rng(0)


@cache
def session(codebook_size: int, top_k: bool, rows_per_image: int) -> ort.InferenceSession:
    """logits, step, noise and sampling -> tokens."""
    ops, float32, int64 = Operators(), ir.DataType.FLOAT, ir.DataType.INT64
    shapes = {
        "logits": (float32, [rows_per_image * IMAGES, codebook_size]),
        "step": (int64, [1]),
        "noise": (float32, [ROWS, IMAGES, codebook_size]),
        "cfg_scale": (float32, [IMAGES]),
        "temperature": (float32, [IMAGES]),
    }
    shapes |= {"top_k": (int64, [IMAGES])} if top_k else {}
    inputs = {
        name: ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for name, (dtype, shape) in shapes.items()
    }
    defaults = [num_sorted_input(codebook_size)] * top_k
    inputs |= {value.name: value for value in defaults}
    config = replace(
        PUBLISHED["janus-pro-1b"], codebook_size=codebook_size, rows_per_image=rows_per_image
    )
    noise = noise_of_step(ops, inputs["noise"], inputs["step"])
    token = draw_tokens(ops, config, inputs["logits"], noise, inputs)
    token.name, token.type = "token", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(
        list(inputs.values()),
        [token],
        nodes=ops.tape.nodes,
        initializers=defaults,
        opset_imports={"": OPSET},
        name="sampler",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def draws(
    logits: np.ndarray, noise: np.ndarray, step: int, sampling: list[Sampling]
) -> tuple[np.ndarray, np.ndarray]:
    """(graph's tokens, torch's tokens)."""
    numbers = dict(sampling_inputs(sampling))
    tensors = {name: torch.from_numpy(values) for name, values in numbers.items()}
    row = torch.from_numpy(noise[step % ROWS])
    theirs = torch_draw_tokens(torch.from_numpy(logits), row, **tensors).numpy()
    top_k = bool(numbers["top_k"].any())
    if top_k:
        greatest = min(numbers["top_k"].max(), logits.shape[1])
        numbers[NUM_SORTED_CODES] = np.array([greatest])
    else:
        del numbers["top_k"]
    feeds = {"logits": logits, "step": np.array([step]), "noise": noise, **numbers}
    (ours,) = session(logits.shape[1], top_k, len(logits) // IMAGES).run(None, feeds)
    return ours, theirs


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    images = [ImageSeed(5, image) for image in range(IMAGES)]
    return GumbelNoise(images, JANUS_CODEBOOK)(range(ROWS))


@pytest.mark.parametrize("top_k", [0, 1, 50, 2048, 2049, 3840, 3841, 4000, 8000, 16_384, 10**6])
def test_graph_and_torch_sample_the_same_tokens(noise: np.ndarray, top_k: int) -> None:
    logits = RNG.normal(0, 1.5, (2 * IMAGES, JANUS_CODEBOOK)).astype(np.float32)
    for step in range(4):
        ours, theirs = draws(logits, noise, step, [Sampling(2.0, 1.0, top_k)] * IMAGES)
        np.testing.assert_array_equal(ours, theirs)


def test_each_image_is_sampled_in_its_own_way(noise: np.ndarray) -> None:
    logits = RNG.normal(0, 1.5, (2 * IMAGES, JANUS_CODEBOOK)).astype(np.float32)
    sampling = [
        Sampling(scale, temperature, top_k)
        for scale, temperature, top_k in (
            [(1.0, 1.0, 0), (5.0, 0.0, 0), (5.0, 0.7, 3), (2.0, 1.3, 5000)] * 2
        )
    ]
    together, theirs = draws(logits, noise, 2, sampling)
    np.testing.assert_array_equal(together, theirs)
    for image, one in enumerate(sampling):
        alone, _ = draws(logits, noise, 2, [one] * IMAGES)
        assert alone[image] == together[image]


@pytest.mark.parametrize("top_k", [0, 7])
def test_a_model_without_guidance_has_one_row_an_image(noise: np.ndarray, top_k: int) -> None:
    logits = RNG.normal(0, 1.5, (IMAGES, JANUS_CODEBOOK)).astype(np.float32)
    ours, theirs = draws(logits, noise, 1, [Sampling(5.0, 1.0, top_k)] * IMAGES)
    np.testing.assert_array_equal(ours, theirs)
    if not top_k:
        np.testing.assert_array_equal(ours, (logits + noise[1]).argmax(axis=1))


@pytest.mark.parametrize("top_k", [0, 7])
def test_temperature_0_takes_the_greatest_guided_logit(noise: np.ndarray, top_k: int) -> None:
    logits = RNG.normal(0, 1.5, (2 * IMAGES, JANUS_CODEBOOK)).astype(np.float32)
    ours, _ = draws(logits, noise, 0, [Sampling(3.0, 0.0, top_k)] * IMAGES)
    conditional, unconditional = np.split(logits, 2)
    guided = unconditional + np.float32(3) * (conditional - unconditional)
    np.testing.assert_array_equal(ours, guided.argmax(axis=1))


def test_of_equal_numbers_the_lowest_code_is_drawn() -> None:
    logits, none = np.zeros((2 * IMAGES, 64), np.float32), np.zeros((ROWS, IMAGES, 64), np.float32)
    for top_k in (0, 5):
        for tokens in draws(logits, none, 0, [Sampling(1.0, 1.0, top_k)] * IMAGES):
            assert (tokens == 0).all()


def test_top_k_keeps_exactly_the_greatest(noise: np.ndarray) -> None:
    """With a temperature that drowns the logits, every kept code is drawn and no other."""
    logits = np.zeros((2 * IMAGES, 64), np.float32)
    order = RNG.permutation(64)
    logits[:IMAGES, order] = np.arange(64, 0, -1)
    images = [ImageSeed(seed, image) for seed in range(60) for image in range(IMAGES)]
    many = GumbelNoise(images, 64)(range(ROWS)).reshape(ROWS, 60, IMAGES, 64)
    drawn: set[int] = set()
    for part in range(60):
        sampling = [Sampling(1.0, 1000.0, 9)] * IMAGES
        drawn |= set(draws(logits, np.ascontiguousarray(many[:, part]), 1, sampling)[0].tolist())
    assert drawn == set(order[:9].tolist())


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.7, 0), (1.0, 6)])
def test_a_million_draws_are_distributed_as_softmax(temperature: float, top_k: int) -> None:
    codes, steps = 24, 1000
    images = [ImageSeed(3, image) for image in range(1000)]
    race = torch.from_numpy(GumbelNoise(images, codes)(range(steps))).reshape(-1, codes)
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (1, codes)).astype(np.float32))
    tensors = {
        name: torch.from_numpy(values).expand(len(race))
        for name, values in sampling_inputs([Sampling(1.0, temperature, top_k)]).items()
    }
    rows = torch.cat([logits.expand(len(race), -1), torch.zeros(len(race), codes)])
    counts = torch_draw_tokens(rows, race, **tensors).bincount(minlength=codes).numpy()
    scaled = logits[0].double().numpy() / temperature
    kept = np.argsort(-scaled)[: top_k or codes]
    assert counts.sum() == counts[kept].sum() == 10**6
    expected = 10**6 * np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    assert statistic < chi_squared_quantile(len(kept) - 1, 1 - 1e-4)


def chi_squared_quantile(freedom: int, share: float) -> float:
    """By Wilson and Hilferty's approximation."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + NormalDist().inv_cdf(share) * part**0.5) ** 3


def test_a_draw_hardly_moves_when_logits_hardly_move() -> None:
    images = [ImageSeed(4, image) for image in range(200)]
    race = torch.from_numpy(GumbelNoise(images, 64)(range(100))).reshape(-1, 64)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(len(race), 64, generator=rng)
    moved = logits + 0.01 * torch.randn(len(race), 64, generator=rng)
    ones = torch.ones(len(race))
    tokens = [
        torch_draw_tokens(
            torch.cat([one, torch.zeros_like(one)]), race, ones, ones, torch.zeros(len(race))
        )
        for one in (logits, moved)
    ]
    changed = (tokens[0] != tokens[1]).float().mean()
    assert 0 < changed < 0.02
