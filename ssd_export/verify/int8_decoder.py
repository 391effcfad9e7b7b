"""Rung `int8_decoder`: what rounding does to the pixels of images that the bundle generates."""

from __future__ import annotations

from ssd_export.bundle import Bundle
from ssd_export.bundle.config import LEAST_DECODER_PSNR
from ssd_export.metrics.similarity import psnr
from ssd_export.runtime.ort_runner import INEXACT_INT8, OrtRunner
from ssd_export.verify.checks import Divergence, Rung
from ssd_export.verify.generation import Ladder


def check_int8_decoder(bundle: Bundle, ladder: Ladder, num_threads: int | None) -> Rung:
    """Compares both decoders on the images of the ladder, which have been generated."""
    runner = OrtRunner(bundle, num_threads=num_threads)
    try:
        if not runner.decodes_in_int8:
            return Rung("int8_decoder", {"not_run": INEXACT_INT8})
        found = min(
            psnr(runner.decode_image(tokens)[0], pixels) for tokens, pixels in ladder.decoded()
        )
    finally:
        runner.close()
    figures = {"psnr": found, "least": LEAST_DECODER_PSNR}
    if found >= LEAST_DECODER_PSNR:
        return Rung("int8_decoder", figures)
    what = (
        f"the int8 image decoder is {found:.1f} dB from the float one, at least"
        f" {LEAST_DECODER_PSNR:g} are asked for: export with --decoder-samples"
    )
    return Rung("int8_decoder", figures, Divergence(what))
