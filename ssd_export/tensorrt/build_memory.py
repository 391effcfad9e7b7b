"""The memory that a build will need, estimated and compared with what is free before any work
starts.

Measured with TensorRT-RTX on the decode step of Janus-Pro-1B's shape in fp16 (2.5 GB of weights):
6.1 GB at the peak with the weights inside (7.5 GiB on another export), 0.6 GB with its matrices as
inputs, which the builder never reads. TensorRT times its tactics on the device and allocates inputs
there, which on a Jetson is the same memory: not measured.
"""

from __future__ import annotations

from ssd_export.bundle import Bundle
from ssd_export.plan.memory import check_fits
from ssd_export.plan.sizes import CODES, StoredWeight, stored_weights, weights_file
from ssd_export.plan.stages import build_bytes
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.target import Target

__all__ = [
    "StoredWeight",
    "check_memory",
    "is_shared",
    "needed_bytes",
    "shared_weights",
    "stored_weights",
    "weights_file",
]


# Of the decode step alone: there is nothing to share, and where the batch is fixed TensorRT-RTX
# 1.7.1 copies such an input before every product.
OF_ONE_GRAPH = ("generation_embeddings.", "generation_aligner.")


def is_shared(weight: StoredWeight) -> bool:
    """Whether a tensor can be an input of prefill and decode_step: the matrices, which are nearly
    all the bytes.
    """
    return len(weight.shape) == 2 and weight.dtype not in CODES


def shared_weights(bundle: Bundle) -> dict[str, StoredWeight]:
    """The weights that become inputs of prefill and decode_step: the matrices that both have, but
    quantized ones with their scales.

    Codes and scales stay constants: TensorRT-RTX 1.7.1 makes one layer of a dequantized constant
    and its product, but writes the whole matrix in fp16 before every product where either is an
    input.
    """
    weights = stored_weights(bundle)
    quantized = {f"{name}.scale" for name, weight in weights.items() if weight.dtype in CODES}
    return {
        name: weight
        for name, weight in weights.items()
        if is_shared(weight) and name not in quantized and not name.startswith(OF_ONE_GRAPH)
    }


def needed_bytes(bundle: Bundle, target: Target, flavor: Flavor) -> int:
    """Peak bytes of building this bundle's largest engine."""
    embeddings = bundle.config.text_embeddings.offset  # no engine holds them
    weights = stored_weights(bundle)
    inputs = shared_weights(bundle) if target.shared_weights else {}
    shared = sum(weight.num_bytes for weight in inputs.values() if weight.offset != embeddings)
    total = sum(weight.num_bytes for weight in weights.values() if weight.offset != embeddings)
    return build_bytes(flavor.name, total - shared, shared, target.workspace_mib << 20)


def check_memory(needed: int, free: int | None, dtype: str, weights: str) -> None:
    """Raises UserError with ways out where less is free than building needs.

    Args: weights: none, or the format of the quantized ones.
    """
    if free is None:
        return
    ways = [
        "build on a larger machine with the same GPU (--target rtx: any machine) and copy the"
        " bundle back"
    ]
    if dtype == "float32":
        ways.insert(0, "export with --dtype fp16 (half the weights)")
    elif weights == "none":
        ways.insert(0, "export with --weights int4 (a quarter of the weights)")
    check_fits("building", needed, ways, free)
