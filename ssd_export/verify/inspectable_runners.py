"""Runners that let `verify` look into their caches and put a token or a cache in: one interface for
every backend.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssd_export.bundle import Bundle
from ssd_export.calibrate.generate import load_model
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.model.checkpoint import Checkpoint, permute_heads
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.quantization import choose_scheme, dequantize, quantize, to_stored
from ssd_export.policy.layout import inverse_order, query_head_order
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.runner import Runner
from ssd_export.runtime.torch_runner import TorchRunner

PROBES = ("ort", "torch", "trt", "checkpoint")


class Probe(Runner, Protocol):
    """A runner whose caches are open. part: key, value, position or score."""

    def part(self, layer: int, group: int, part: str) -> np.ndarray:
        """A copy: key, value [B, H, S, D], position int32, score float32 [B, H, S]."""

    def put(self, layer: int, group: int, part: str, values: np.ndarray) -> None:
        """Overwrites a cache tensor."""

    def force(self, step: int, tokens: np.ndarray) -> None:
        """Makes int32 [N] the tokens of a step, whatever was drawn."""


class OrtProbe(OrtRunner):
    def part(self, layer: int, group: int, part: str) -> np.ndarray:
        return self.cache(CacheTensor(layer, group, part))

    def put(self, layer: int, group: int, part: str, values: np.ndarray) -> None:
        past = CacheTensor(layer, group, part).past
        self._values[past].update_inplace(np.ascontiguousarray(values))

    def force(self, step: int, tokens: np.ndarray) -> None:
        every = self._values["tokens"].numpy().copy()
        every[step] = tokens
        self._values["tokens"].update_inplace(every)


class TorchProbe(TorchRunner):
    def part(self, layer: int, group: int, part: str) -> np.ndarray:
        tensor = getattr(self.state(layer, group), part)
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy().copy()

    @torch.inference_mode()
    def put(self, layer: int, group: int, part: str, values: np.ndarray) -> None:
        getattr(self.state(layer, group), part).copy_(
            torch.from_numpy(np.ascontiguousarray(values))
        )

    @torch.inference_mode()
    def force(self, step: int, tokens: np.ndarray) -> None:
        self._tokens[step] = torch.from_numpy(tokens).to(self._device)


class CheckpointProbe(TorchProbe):
    """The checkpoint's own weights under the bundle's policy: heads are permuted in the
    activations, so neither the exporter's weights nor its permutation is trusted."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, provider: str = "cpu") -> None:
        self._device, self._config = provider, bundle.config.model
        self._table = bundle.config.policy
        self._dtype = getattr(torch, bundle.config.dtype)
        self._model = load_model(checkpoint, provider, self._dtype, text_embedding=False)
        quantize_layers(self._model, bundle.config.precision.weights, self._table)
        self._image_decoder = ImageDecoder(checkpoint.config).to(provider, self._dtype)
        names = self._image_decoder.state_dict()
        self._image_decoder.load_state_dict(
            {name: checkpoint.tensor(name, self._dtype) for name in names}
        )
        self._image_decoder.eval().requires_grad_(False)
        self._states = []

    def _attend_prompt(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._restored(
            layer, super()._attend_prompt(layer, *self._permuted(layer, query, key, value))
        )

    def _attend_cache(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._restored(
            layer, super()._attend_cache(layer, *self._permuted(layer, query, key, value))
        )

    def _permuted(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        order = list(self._table.head_order[layer])
        return query[:, self._query_order(layer)], key[:, order], value[:, order]

    def _restored(self, layer: int, out: Tensor) -> Tensor:
        return out[:, list(inverse_order(self._query_order(layer)))]

    def _query_order(self, layer: int) -> list[int]:
        return list(query_head_order(self._table.head_order[layer], self._config.query_group_size))


@torch.inference_mode()
def quantize_layers(model: ImageTokenModel, weights: str, table: PolicyTable) -> None:
    """Rounds the layers' matrices to what codes and scales of a bundle's format hold; int4 blocks
    run over permuted heads.
    """
    back = tuple(inverse_order(order) for order in table.head_order)
    for name, parameter in model.named_parameters():
        scheme = (
            choose_scheme(weights, parameter.shape[-1], parameter.shape[:1])
            if name.endswith("_proj.weight")
            else None
        )
        if scheme is None:
            continue
        permuted = permute_heads(name, parameter.cpu(), table.head_order, model.config)
        stored = to_stored(*quantize(permuted, scheme, parameter.dtype), scheme)
        parameter.copy_(permute_heads(name, dequantize(*stored).T, back, model.config))


def open_probe(name: str, bundle: Bundle, provider: str, checkpoint: Checkpoint | None) -> Probe:
    """The probe of that name. Raises: UserError for one that is not there."""
    if name == "ort":
        return OrtProbe(bundle, provider, exact=True)
    if name == "torch":
        return TorchProbe(bundle, provider)
    if name == "checkpoint" and checkpoint is not None:
        return CheckpointProbe(bundle, checkpoint, provider)
    if name == "trt":
        from ssd_export.tensorrt.inspectable_runner import TrtProbe
        from ssd_export.tensorrt.runner import open_device

        return TrtProbe(bundle, *open_device(bundle))
    raise UserError(f"unknown runner {name!r}; use one of {', '.join(PROBES)}")
