"""The checkpoint's own weights as a runner: neither the exporter's weights nor its permutation of
heads is trusted.
"""

from __future__ import annotations

import torch

from ssd_export.bundle import Bundle, Precision
from ssd_export.cache.attention import decode_layer
from ssd_export.export.quantize import HEAD_MATRICES
from ssd_export.model.checkpoint import Checkpoint, permute_heads
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.load import load_image_decoder, load_model
from ssd_export.model.permuted_heads import PermutedHeads
from ssd_export.model.quantization import choose_scheme, dequantize, quantize, to_stored
from ssd_export.policy.layout import inverse_order
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.torch_runner import TorchRunner


def checkpoint_runner(bundle: Bundle, checkpoint: Checkpoint, provider: str = "cpu") -> TorchRunner:
    """The checkpoint in torch under the bundle's policy, its weights rounded as the bundle's are;
    heads are permuted in the activations.
    """
    table, dtype = bundle.config.policy, getattr(torch, bundle.config.dtype)
    model = load_model(checkpoint, provider, dtype, text_embedding=False)
    round_matrices(model, bundle.config.precision, table)
    image_decoder = load_image_decoder(checkpoint, provider, dtype)
    permuted = PermutedHeads(model, table)
    return TorchRunner(permuted, image_decoder, table, provider, decode_layer)


@torch.inference_mode()
def round_matrices(model: ImageTokenModel, precision: Precision, table: PolicyTable) -> None:
    """Rounds matrices to what codes and scales of a bundle's formats hold; int4 blocks run over
    permuted heads.
    """
    back = tuple(inverse_order(order) for order in table.head_order)
    for name, parameter in model.named_parameters():
        stem = name.removesuffix(".weight")
        is_of_head = stem in HEAD_MATRICES
        format = precision.head if is_of_head else precision.weights
        is_matrix = is_of_head or stem.endswith("_proj")
        scheme = (
            choose_scheme(format, parameter.shape[-1], parameter.shape[:1]) if is_matrix else None
        )
        if scheme is None:
            continue
        permuted = permute_heads(name, parameter.cpu(), table.head_order, model.config)
        stored = to_stored(*quantize(permuted, scheme, parameter.dtype), scheme)
        parameter.copy_(permute_heads(name, dequantize(*stored).T, back, model.config))
