"""Scales of the image decoder's int8 convolutions.

One of a convolution's input; one of each output channel, which costs nothing, since the weights'
scales are divided by them; one of each output channel of the weights. A nearest doubling and its
convolution are four 2 x 2 convolutions of the small tensor: 4 products instead of 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssd_export.export.decoder_ranges import Range

# How much wider than seen in calibration, for other images; twice as wide costs 6 dB.
IN_MARGIN, OUT_MARGIN = 1.2, 1.5
SILU_LEAST = -0.2785  # of x * sigmoid(x)
MIDDLE = 128  # zero point of every output; the channel's own is folded into its bias


@dataclass(frozen=True)
class InputScale:
    """Scale float32 of each input channel, and the zero point of all.

    QLinearConv knows `common` alone; what a channel's scale differs by is in its weights. The
    square root shares the range out between the channel and its weights.
    """

    scale: np.ndarray
    common: float
    zero_point: int

    @classmethod
    def of(cls, seen: Range) -> InputScale:
        """The range that the channels have shown, and a margin."""
        own = np.sqrt(np.maximum(np.maximum(seen.high, -seen.low), 1e-3))
        own /= np.exp(np.log(own).mean())
        least = np.where(seen.low < SILU_LEAST - 1e-3, IN_MARGIN * seen.low, seen.low)
        low, high = float((least / own).min()), float((IN_MARGIN * seen.high / own).max())
        common = max((high - low) / 255, 1e-8)
        zero_point = int(np.clip(round(-low / common), 0, 255))
        return cls((own * common).astype(np.float32), common, zero_point)


@dataclass(frozen=True)
class OutputScale:
    """Scale float32 and zero point uint8 of each output channel."""

    scale: np.ndarray
    zero_point: np.ndarray

    @classmethod
    def of(cls, seen: Range) -> OutputScale:
        """The range that each channel has shown, and a margin."""
        scale = np.maximum(OUT_MARGIN * (seen.out_high - seen.out_low) / 255, 1e-8).astype(
            np.float32
        )
        zero_point = np.clip(np.round(-OUT_MARGIN * seen.out_low / scale), 0, 255).astype(np.uint8)
        return cls(scale, zero_point)


@dataclass(frozen=True)
class QuantizedWeights:
    """codes int8 [O, I, h, w]; scale float32 [O], divided by the output's; bias int32 [O]."""

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(
        cls, weight: np.ndarray, bias: np.ndarray, seen: Range, into: InputScale, out: OutputScale
    ) -> QuantizedWeights:
        """Rounds weights [O, I, h, w]. The bias takes back what their rounding does to the mean,
        and moves each channel from its own zero point to MIDDLE.
        """
        own = (into.scale / into.common)[None, :, None, None]
        weight, mean = weight * own, seen.mean / own[0, :, 0, 0]
        scale = np.maximum(np.abs(weight).max(axis=(1, 2, 3)), 1e-12) / 127
        codes = np.round(weight / scale[:, None, None, None])
        error = (codes * scale[:, None, None, None] - weight).sum(axis=(2, 3)) @ mean
        moved = bias - error + (out.zero_point.astype(np.float64) - MIDDLE) * out.scale
        return cls(
            codes.astype(np.int8),
            (scale / out.scale).astype(np.float32),
            np.round(moved / (into.common * scale)).astype(np.int32),
        )


def phase(weight: np.ndarray, odd: int, axis: int) -> np.ndarray:
    """The two taps along an axis that 3 taps on doubled rows are for an even or an odd row."""
    first, middle, last = np.split(weight, 3, axis)
    pair = (first + middle, last) if odd else (first, middle + last)
    return np.concatenate(pair, axis)
