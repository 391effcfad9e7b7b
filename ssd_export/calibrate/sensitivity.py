"""Estimates how much the next-token distribution depends on each head: one backward pass, layer by
layer.

A layer is recomputed when its turn comes, so that one layer's graph is in memory at a time, beside
the hidden states between layers. float32 throughout: where the weights are not, one layer's copy is
at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_export.cache.replay import DenseAttention, attend_with_option
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.policy.table import HeadOption
from ssd_export.sampling import Sampling

# Divides the logits once more: where the model is sure of a token, nothing changes its likelihood a
# little, and what a head reads there may be all that makes it sure.
SOFTENING = 3.0


@dataclass(frozen=True)
class LayerView:
    """A layer as it was passed: its attention, and gradient float32 [B, H, I, G*D], of
    `signed_likelihood` by what each image query read.

    With an error e at one query, the square of the product of both has the mean e^T F e, F being
    Fisher's information of all tokens in what this query read, later layers and later tokens
    included: about twice the KL that the error causes.
    """

    dense: DenseAttention
    gradient: Tensor


@torch.no_grad()
def hidden_states(model: ImageTokenModel, hidden: Tensor, prompt_length: int) -> list[Tensor]:
    """float32 [B, T, hidden] before every layer, and after the last."""
    states = [hidden.float()]
    cos, sin = rope(model, states[0], prompt_length)
    for layer in model.language_model.layers:
        states.append(wide(layer)(states[-1], cos, sin, causal))
    return states


def sampled_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """[N, image tokens, V], what tokens are sampled from, of N conditional rows and, with guidance,
    their N unconditional ones after them.
    """
    if sampling.cfg_scale != 1:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + sampling.cfg_scale * (conditional - unconditional)
    return logits / (sampling.temperature or 1.0)


def signed_likelihood(logits: Tensor, signs: Tensor) -> Tensor:
    """Sum over steps and tokens of +-sqrt(p) log p, the roots held fixed; logits, signs
    [image tokens, V].

    Over random signs, g g^T of its gradient g has the mean sum p (grad log p)(grad log p)^T,
    Fisher's information, as that of a sampled token's log-likelihood has; but an unlikely token is
    in every sample of it.
    """
    likelihood = (logits / SOFTENING).log_softmax(-1)
    return (likelihood * (likelihood.detach() / 2).exp() * signs).sum()


def random_signs(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """float32 of -1 and 1."""
    return torch.from_numpy(2 * rng.integers(0, 2, shape, np.int8) - 1).float()


def output_gradient(
    model: ImageTokenModel,
    hidden: Tensor,
    prompt_length: int,
    sampling: Sampling,
    rng: np.random.Generator,
) -> Tensor:
    """Gradient [B, T, hidden] of `signed_likelihood` by the hidden states after the last layer.

    Args: hidden: of the conditional row, and where there is guidance of the unconditional one.
    """
    head, norm = wide(model.generation_head), wide(model.language_model.norm)
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        scaled = sampled_logits(head(norm(leaf[:, prompt_length - 1 :])), sampling)[0]
        signs = random_signs(rng, tuple(scaled.shape)).to(scaled.device)
        (gradient,) = torch.autograd.grad(signed_likelihood(scaled, signs), leaf)
    return gradient


def pass_back(
    model: ImageTokenModel, index: int, hidden: Tensor, gradient: Tensor, prompt_length: int
) -> tuple[LayerView, Tensor]:
    """The layer, and the gradient [B, T, hidden] before it from the one after it."""
    seen: list[Tensor] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = causal(layer, query, key, value)
        seen.extend((query, key, value, out))
        return out

    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        turned = rope(model, hidden, prompt_length)
        passed = wide(model.language_model.layers[index])(leaf, *turned, attend)
        by_read, before = torch.autograd.grad(passed, (seen[3], leaf), gradient)
    query, key, value, _ = (tensor.detach() for tensor in seen)
    dense = DenseAttention.compute(query, key, value, prompt_length, model.config.grid)
    read = by_read[:, :, prompt_length:].unflatten(1, dense.out.shape[1:3])  # [B, H, G, I, D]
    return LayerView(dense, read.transpose(2, 3).flatten(3)), before


class Fisher:
    """Costs of one image by one pass back: about the divergence, as far as errors are small."""

    def __init__(
        self,
        model: ImageTokenModel,
        last: Tensor,
        prompt_length: int,
        sampling: Sampling,
        rng: np.random.Generator,
    ) -> None:
        """Prepares one image's costs.

        Args: last: float32 [B, T, hidden] after the last layer, of the conditional row and, with
        guidance, the other.
        """
        self._model, self._prompt_length = model, prompt_length
        self._gradient = output_gradient(model, last, prompt_length, sampling, rng)

    def layer(
        self, index: int, hidden: Tensor, options: Sequence[HeadOption], prompt_slots: int
    ) -> tuple[DenseAttention, Tensor]:
        """The layer's attention, and `option_errors`. Layers from the last to the first."""
        view, self._gradient = pass_back(
            self._model, index, hidden, self._gradient, self._prompt_length
        )
        return view.dense, option_errors(view, options, prompt_slots)


def option_errors(view: LayerView, options: Sequence[HeadOption], prompt_slots: int) -> Tensor:
    """float64 [H, options]: (lost . gradient)^2 / 2, mean over image queries, summed over the rows.

    lost = what the head reads with the full cache less what it reads with the option. Query by
    query: a head may matter in the few steps alone in which it reads what the option has lost.
    """
    dense = view.dense
    errors = []
    for option in options:
        lost = dense.out[:, :, :, dense.prompt_length :] - attend_with_option(
            dense, option, prompt_slots
        )
        lost = lost.transpose(2, 3).flatten(3)  # [B, H, I, GD]
        errors.append(
            (lost * view.gradient).sum(dim=-1).double().square().mean(dim=2).sum(dim=0) / 2
        )
    return torch.stack(errors, dim=-1)


def causal(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attend` of the decoder over everything before."""
    size = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(size, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def rope(model: ImageTokenModel, hidden: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [1, 1, T, D], of hidden states [B, T, hidden] that begin with the prompt."""
    positions = torch.arange(hidden.shape[1])[None]
    return model.language_model.rope(positions, hidden.dtype, prompt_length)


def wide(module: nn.Module) -> nn.Module:
    """The module in float32: itself or a copy."""
    if next(module.parameters()).dtype == torch.float32:
        return module
    return copy.deepcopy(module).float()
