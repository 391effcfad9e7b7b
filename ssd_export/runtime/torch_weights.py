"""The torch runner's modules out of a bundle's weights file."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssd_export.bundle import Bundle
from ssd_export.config import ModelConfig
from ssd_export.errors import UserError, printable
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.quantization import dequantize
from ssd_export.model.uninitialized import Uninitialized


def load_modules(
    bundle: Bundle, config: ModelConfig, device: str
) -> tuple[ImageTokenModel, ImageDecoder]:
    """The torch modules with the bundle's weights: what the graphs multiply by [in, out] is [out,
    in] here.
    """
    with Uninitialized():
        model, decoder = ImageTokenModel(config), ImageDecoder(config)
    path = bundle.file("onnx/weights.safetensors")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for module in (model, decoder):
                matrices = _Matrices(file)
                names = module.state_dict()
                state = {name: _stored(file, matrices, name, config) for name in names}
                _check_dtypes(state, getattr(torch, bundle.config.dtype))
                module.load_state_dict(state, assign=True)
                module.eval().requires_grad_(False)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = printable(
            (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
        )
        if "allocate" in str(error) or "out of memory" in str(error):
            raise UserError(
                f"not enough memory for the weights of {bundle.path} ({reason}); free some, or use"
                " --runner ort, which takes less for quantized weights"
            ) from error
        raise UserError(
            f"{path} does not hold the weights that ssd_config.json describes ({reason}); export"
            " the bundle again with --force, or copy it again from where it came"
        ) from error
    return model.to(device), decoder.to(device)


def _check_dtypes(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError for a tensor of another dtype, as in the weights of another bundle."""
    for name, tensor in state.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, not {dtype}")


class _Matrices:
    """Matrices [in, out] of a weights file; a quantized one is multiplied out once for all the
    modules that share it.
    """

    def __init__(self, file: safe_open) -> None:
        self._file, self._names = file, set(file.keys())
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        scale = f"{name}.scale"
        if scale not in self._names:
            return self._file.get_tensor(name)
        if self._last is None or self._last[0] != name:
            self._last = name, dequantize(self._file.get_tensor(name), self._file.get_tensor(scale))
        return self._last[1]


def _stored(file: safe_open, matrices: _Matrices, name: str, config: ModelConfig) -> Tensor:
    """A tensor of the modules, out of the weights file (export/weights.py has the other
    direction).
    """
    if name in file.keys():  # noqa: SIM118 - safe_open has no __contains__
        return file.get_tensor(name)
    stem = name.removesuffix(".weight")
    if stem in file.keys():  # noqa: SIM118 - safe_open has no __contains__
        return matrices[stem].T
    prefix, layer, block, part = stem.removeprefix("language_model.").split(".")
    root = f"{prefix}.{layer}"
    if part in ("q_proj", "k_proj", "v_proj"):
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return matrices[f"{root}.qkv"].T.split([query, kv, kv])["qkv".index(part[0])]
    if part in ("gate_proj", "up_proj"):
        return matrices[f"{root}.gate_up"].T.chunk(2)[part == "up_proj"]
    return matrices[f"{root}.{part.removesuffix('_proj')}"].T
