"""The comparison of image decoders: turns of all, each against float32 of the same turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import image_decoder
from benchmarks.image_decoder import FLOAT, compare, of_shape, random_codes
from ssd_export.config import VQConfig
from ssd_export.model.families import PUBLISHED


def test_every_decoder_has_as_many_turns() -> None:
    calls: list[str] = []

    def decoder(name: str, level: int) -> image_decoder.Decode:
        def decode(codes: np.ndarray) -> np.ndarray:
            calls.append(name)
            return np.full((1, 4, 4, 3), level + float(codes.sum()))

        return decode

    codes = np.zeros((1, 4), np.int32)
    found = compare({FLOAT: decoder(FLOAT, 100), "int8": decoder("int8", 101)}, codes, 3)
    assert calls == [FLOAT, "int8"] * 4  # the first turn is not timed
    assert found[FLOAT]["cpu_times_as_fast"] == 1 and found[FLOAT]["wall_range"] == [1, 1]
    assert found["int8"]["psnr"] == pytest.approx(20 * np.log10(255))


def test_decoders_of_a_shape_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small shape, whose int8 pixels are near those of float32 whatever this processor is."""
    small = replace(PUBLISHED["janus-pro-1b"], vq=VQConfig(32, 32, (1, 2), 1))
    monkeypatch.setitem(PUBLISHED, "small", small)
    monkeypatch.setattr(image_decoder, "find_operators", lambda: None)
    decoders = of_shape("small", tmp_path, 1)
    found = compare(decoders, random_codes(small, 1), 1)
    assert list(found) == [FLOAT, "int8", "int8, doublings float32"]
    assert all(one["psnr"] > 25 for one in found.values())
