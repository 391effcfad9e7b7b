"""Metric, shares and costs against brute force from full attention matrices, on random models."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ssd_export.calibrate.calibration import ABLATION, FISHER, CalibrationSpec, add_image
from ssd_export.calibrate.measure import HeadSums
from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.calibrate.sensitivity import SOFTENING, random_signs, signed_likelihood
from ssd_export.calibrate.sequences import sequence_of
from ssd_export.errors import UserError
from ssd_export.metrics.teacher_forced import Replay
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import prompt_encoder
from ssd_export.model.families.janus import GRID
from ssd_export.model.load import load_model
from ssd_export.policy.make import policy_from_head_options
from ssd_export.policy.menu import scored, window
from ssd_export.policy.table import HeadOption, PolicyTable, Rule
from ssd_export.sampling import Sampling
from tests.janus_checkpoints import TinyJanus, build_model, write_transformers_checkpoint

TINY = {
    "mha": TinyJanus(num_layers=2, num_heads=2, num_kv_heads=2),
    "gqa": TinyJanus(num_layers=2, num_heads=4, num_kv_heads=2, seed=1),
}
OPTIONS = (window(25), scored(64, GRID), HeadOption(Rule(-1, 0, True), 90, 6), window(576))
PROMPT = "two green triangles"
PROMPT_SLOTS = 24
GUIDED = Sampling(5.0, 1.0)


@dataclass(frozen=True)
class Reference:
    """transformers' attentions [layer][2, heads, T, T], hidden states [layer][2, T, hidden], the
    prompt's embeddings and tokens.
    """

    attentions: list[np.ndarray]
    hidden: list[np.ndarray]
    prompts: list[np.ndarray]
    tokens: np.ndarray
    model: ImageTokenModel


@pytest.fixture(scope="module", params=TINY)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    tiny = TINY[request.param]
    checkpoint = open_checkpoint(
        write_transformers_checkpoint(tmp_path_factory.mktemp(request.param), tiny)
    )
    hf = build_model(tiny)
    hf.set_attn_implementation("eager")
    ids = prompt_encoder(checkpoint.config, checkpoint.file).encode([PROMPT], PROMPT_SLOTS).ids
    tokens = np.random.default_rng(0).integers(0, tiny.codebook_size, 576).astype(np.int32)
    with torch.inference_mode():
        image = hf.prepare_embeddings_for_image_generation(
            torch.from_numpy(tokens[None, :-1].astype(np.int64))
        )
        prompt = hf.get_input_embeddings()(torch.from_numpy(ids.astype(np.int64)))
        out = hf.model.language_model(
            inputs_embeds=torch.cat([prompt, image.expand(2, -1, -1)], dim=1),
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
    arrays = [
        [tensor.numpy() for tensor in tensors] for tensors in (out.attentions, out.hidden_states)
    ]
    return Reference(*arrays, list(prompt.numpy()), tokens, load_model(checkpoint))


def measured(
    reference: Reference,
    neighborhood: str = "2d:1",
    costs: str = FISHER,
    sampling: Sampling = GUIDED,
) -> HeadSums:
    spec = CalibrationSpec(
        (PROMPT, "x"),
        1,
        Neighborhood.parse(neighborhood, GRID),
        0,
        sampling,
        PROMPT_SLOTS,
        OPTIONS,
        costs,
    )
    sums = HeadSums.zero(reference.model.config, len(OPTIONS))
    prompts = reference.prompts if sampling.cfg_scale != 1 else reference.prompts[:1]
    add_image(sums, reference.model, prompts, reference.tokens, spec, number=1)
    return sums


def near(kind: str, size: int, query: int, key: int) -> bool:
    if kind == "1d":
        return query - key < size
    return abs(query // 24 - key // 24) <= size and abs(query % 24 - key % 24) <= size


@pytest.mark.parametrize("neighborhood", ["1d:48", "1d:25", "2d:1", "2d:0"])
def test_metric_equals_brute_force(reference: Reference, neighborhood: str) -> None:
    sums = measured(reference, neighborhood)
    kind, size = neighborhood[:2], int(neighborhood[3:])
    start, count = len(reference.prompts[0]), 575
    inside = np.array([[near(kind, size, q, k) for k in range(count)] for q in range(count)])
    for layer, probs in enumerate(reference.attentions):
        image = probs[:, :, start:, start:].astype(np.float64)
        expected = (image * ~inside).sum(axis=(2, 3)) / image.sum(axis=(2, 3))
        np.testing.assert_allclose(sums.metric[1, layer], expected.mean(axis=0), atol=1e-5)
        on_prompt = probs[:, :, start:, :start].sum(axis=(2, 3)) / count
        np.testing.assert_allclose(sums.prompt_share[layer], on_prompt.mean(axis=0), atol=1e-5)
        columns = np.stack([image[..., c::24].sum(axis=(2, 3)) for c in range(24)], axis=-1)
        columns /= image.sum(axis=(2, 3))[..., None]
        np.testing.assert_allclose(sums.column_share[layer], columns.mean(axis=0), atol=1e-5)
    assert sums.num_images.tolist() == [0, 1] and not sums.metric[0].any()
    assert sums.metric[1].min() > 0.02 and sums.metric[1].max() < 1


def test_window_cost_equals_brute_force(reference: Reference) -> None:
    """One graph over the whole model, masks written out, float64."""
    sums, model = measured(reference), reference.model
    config, start = model.config, len(reference.prompts[0])
    slots, size, dim = PROMPT_SLOTS + 25 - start, config.query_group_size, config.head_dim
    model = copy.deepcopy(model).double()
    reads, kept = [], []

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        key, value = key.repeat_interleave(size, 1), value.repeat_interleave(size, 1)
        place = torch.arange(query.shape[2])
        later = place[None, :] > place[:, None]
        logits = (query @ key.mT * dim**-0.5).masked_fill(later, -torch.inf)
        gone = (place[None, :] >= start) & (place[None, :] <= place[:, None] - slots)
        kept.append((logits.masked_fill(gone, -torch.inf).softmax(-1) @ value).detach())
        reads.append((logits.softmax(-1) @ value).requires_grad_())
        return reads[-1]

    hidden = sequence_of(model, reference.prompts, reference.tokens)
    hidden = model(hidden, torch.arange(hidden.shape[1]).expand(2, -1), attend)
    conditional, unconditional = model.image_logits(hidden[:, start - 1 :])
    guided = unconditional + 5.0 * (conditional - unconditional)
    likelihood = (guided / SOFTENING).log_softmax(-1)
    signs = random_signs(np.random.default_rng([0, 1]), tuple(guided.shape)).double()
    signed = (likelihood * likelihood.exp().sqrt().detach() * signs).sum()
    for layer, gradient in enumerate(torch.autograd.grad(signed, reads)):
        for head in range(config.num_kv_heads):
            cost = 0.0
            for row in range(2):
                g, lost = (
                    torch.cat(
                        [
                            part[row, member, start:]
                            for member in range(head * size, (head + 1) * size)
                        ],
                        dim=1,
                    )
                    for part in (gradient, reads[layer] - kept[layer])
                )
                cost += (lost * g).sum(dim=1).square().mean().item()
            assert sums.costs()[layer, head, 0] == pytest.approx(cost / 2, rel=4e-3)
    assert (sums.costs()[..., 3] == 0).all() and (sums.costs()[..., :3] > 0).all()


@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
def test_ablation_cost_equals_a_replay_of_the_whole_model(
    reference: Reference, cfg_scale: float
) -> None:
    """One head's option in a policy table whose other heads keep everything, replayed from the
    first layer on.
    """
    config, model = reference.model.config, reference.model
    costs = measured(reference, costs=ABLATION, sampling=Sampling(cfg_scale, 0.8)).costs()
    rows = 1 if cfg_scale == 1 else 2
    start = len(reference.prompts[0])

    def probabilities(table: PolicyTable | None) -> torch.Tensor:
        hidden = sequence_of(model, reference.prompts[:rows], reference.tokens)
        places = torch.arange(hidden.shape[1]).expand(rows, -1)
        logits = model.image_logits(
            model(hidden, places, Replay(config, table, start))[:, start - 1 :]
        ).double()
        guided = logits[0] if rows == 1 else logits[1] + cfg_scale * (logits[0] - logits[1])
        return (guided / 0.8).softmax(-1)

    with torch.inference_mode():
        full = probabilities(None)
        for layer in range(config.num_layers):
            for head in range(config.num_kv_heads):
                for place, option in enumerate(OPTIONS):
                    chosen = [[OPTIONS[-1]] * config.num_kv_heads for _ in range(config.num_layers)]
                    chosen[layer][head] = option
                    other = probabilities(
                        policy_from_head_options(config, "x", 1.0, PROMPT_SLOTS, chosen)
                    )
                    divergence = (full * (full / other).log()).sum(-1).mean().item()
                    assert costs[layer, head, place] == pytest.approx(
                        divergence, rel=1e-3, abs=1e-9
                    )
    assert (costs[..., 3] == 0).all() and (costs[..., :3] > 1e-8).all()


def test_signs_give_fishers_information() -> None:
    """Over all signs, the mean of g g^T is the sum over tokens of p (grad log p)(grad log p)^T."""
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    gradients = torch.stack(
        [
            torch.autograd.grad(signed_likelihood(logits, signs[None]), logits)[0][0]
            for signs in every
        ]
    )
    p = (logits[0] / SOFTENING).softmax(-1).detach()
    fisher = (torch.diag(p) - torch.outer(p, p)) / SOFTENING**2
    torch.testing.assert_close(gradients.T @ gradients / len(every), fisher)


@pytest.mark.parametrize(
    "text", ["48", "3d:1", "1d:0", "1d:576", "2d:23", "2d:-1", "1d:", "", "1d:99999", "2d:1.5"]
)
def test_neighborhoods_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="use 1d:48"):
        Neighborhood.parse(text, GRID)


def test_one_row_above_is_in_both_neighborhoods() -> None:
    for text in ("1d:25", "2d:1"):
        mask = Neighborhood.parse(text, GRID).mask(575, GRID.width)
        assert mask[30, 6] and mask[30, 30] and not mask[100, 30]
    assert not Neighborhood.parse("1d:24", GRID).mask(575, GRID.width)[30, 6]
    assert not Neighborhood.parse("2d:1", GRID).mask(575, GRID.width)[24, 23], (
        "the end of the row above is far away on the grid"
    )
