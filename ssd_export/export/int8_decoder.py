"""The image decoder in int8: calibrated, written, measured against float32, and refused where its
pixels are too far off.

What rounds worst are the convolutions after a doubling: the sum of the residual blocks goes through
them as it is, not normalized. As many of them as it takes stay in float32, the last ones first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ssd_export.bundle.config import LEAST_DECODER_PSNR, Int8Decoder
from ssd_export.bundle.graphs import FUSED, INT8_DECODER_TENSORS
from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.export.decoder_ranges import ENOUGH_IMAGES, Range, calibration_grids, measure_ranges
from ssd_export.export.fused_decoder_writer import FusedInt8Writer
from ssd_export.export.int8_decoder_writer import Int8Writer
from ssd_export.export.tensor_file import TensorFile
from ssd_export.graph_spec import GraphSpec
from ssd_export.machine import multiplies_int8_exactly
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.load import load_image_decoder

SAME_PSNR = 100.0  # dB, stands for no difference at all
Progress = Callable[[str, int, int], None]


def make_int8_decoder(
    folder: Path, checkpoint: Checkpoint, samples: Path, progress: Progress
) -> tuple[GraphSpec, Int8Decoder]:
    """Writes the graph into a folder, and returns its contract and what was measured.

    Args: samples: images to calibrate with (decoder_ranges.py).
    Raises: UserError for samples that are none, and for pixels that are too far from float32's.
    """
    config = checkpoint.config
    calibration, held_out = calibration_grids(config, samples)
    decoder = load_image_decoder(checkpoint)
    doublings = [
        f"vqmodel.decoder.up.{level}.upsample.conv"
        for level in range(len(config.vq.channel_multipliers) - 1)
    ]
    total = len(calibration) + len(held_out) + len(doublings) + 1
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("image decoder", done, total)

    ranges = measure_ranges(decoder, calibration, advance)
    wanted = []
    for grid in held_out:
        wanted.append(float_levels(decoder, grid))
        advance()
    tensors, psnr = decoder.state_dict(), 0.0
    for num_kept in range(len(doublings) + 1):
        kept = doublings[len(doublings) - num_kept :]
        spec, path = write_int8_decoder(folder, config, tensors, ranges, frozenset(kept))
        psnr = least_psnr(path, held_out, wanted)
        advance()
        if psnr >= LEAST_DECODER_PSNR:
            if done < total:
                progress("image decoder", total, total)
            return spec, Int8Decoder(psnr, len(calibration), tuple(kept))
    raise UserError(
        f"the image decoder in int8 keeps {psnr:.1f} dB, and {LEAST_DECODER_PSNR:g} are asked for:"
        " use --decoder-weights none, or more images in --decoder-samples"
    )


@torch.inference_mode()
def float_levels(decoder: ImageDecoder, grid: np.ndarray) -> np.ndarray:
    """Levels float32 [height, width, channels] in 0..255 of one grid, int [image tokens]."""
    pixels = decoder(torch.from_numpy(grid[None].astype(np.int64)))[0]
    return ((pixels + 1) / 2 * 255).clamp(0, 255).permute(1, 2, 0).numpy()


def least_psnr(path: Path, grids: np.ndarray, wanted: list[np.ndarray]) -> float:
    """The least PSNR in dB of the levels that an ONNX file makes from grids."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for grid, levels in zip(grids, wanted, strict=True):
        (pixels,) = session.run(["pixels"], {"codes": grid[None].astype(np.int32)})
        error = float(np.mean((pixels[0].astype(np.float64) - levels) ** 2))
        found.append(min(SAME_PSNR, 10 * math.log10(255**2 / error)) if error else SAME_PSNR)
    return min(found)


def write_int8_decoder(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, torch.Tensor],
    ranges: dict[str, Range],
    kept: frozenset[str] = frozenset(),
) -> tuple[GraphSpec, Path]:
    """Writes the graph into a folder: its contract and its file.

    Beside them: the file of its tensors and, over the same tensors, the graph for the library of
    operators.
    Args: tensors: float32, by the checkpoint's names. ranges: of measure_ranges. kept: convolutions
    after a doubling that stay in float32.
    """
    file = TensorFile(folder / INT8_DECODER_TENSORS)
    spec, model = Int8Writer(config, tensors, ranges, file, kept).model()
    _, fused = FusedInt8Writer(config, tensors, ranges, file, kept).model()
    path = folder / f"{spec.name}.onnx"
    ir.save(model, path)
    ir.save(fused, folder / f"{spec.name}{FUSED}.onnx")
    return spec, path


def check_can_make(checkpoint: Checkpoint, samples: Path | None) -> None:
    """Raises UserError, before anything is written, where ONNX Runtime or the samples will not
    do.
    """
    if samples is None:
        raise UserError(
            "--decoder-weights int8 is calibrated on images of the model: export without it, run"
            f" ssd-export generate with {ENOUGH_IMAGES} prompts and --save-tokens FILE.npy, and"
            " export again with --decoder-samples FILE.npy"
        )
    calibration_grids(checkpoint.config, samples)
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--decoder-weights int8 measures its pixels with ONNX Runtime ({error}): pip install"
            ' "ssd-export[ort]"'
        ) from error
    if not multiplies_int8_exactly():
        raise UserError(
            "--decoder-weights int8 measures its pixels on this machine, whose processor has no"
            " instructions that multiply int8 exactly (AVX-512 VNNI, AVX-VNNI, ARM): export on one"
            " that has, or use --decoder-weights none"
        )
