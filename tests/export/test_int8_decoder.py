"""The image decoder in int8: against float32, by itself, refused where it is too far off."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F

from ssd_export.bundle import open_bundle
from ssd_export.bundle.config import LEAST_DECODER_PSNR
from ssd_export.bundle.config_reader import parse_config
from ssd_export.demo.codes import encode_scene
from ssd_export.errors import UserError
from ssd_export.export import int8_decoder
from ssd_export.export.decoder_ranges import LEAST_IMAGES, Range, calibration_grids
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.export.int8_scales import InputScale, OutputScale, QuantizedWeights, phase
from ssd_export.machine import multiplies_int8_exactly
from ssd_export.metrics.scene_score import draw_scenes
from ssd_export.metrics.similarity import psnr
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.find import find_model
from ssd_export.runtime import ort_runner
from ssd_export.runtime.ort_operators import LIBRARY_VARIABLE, add_operators
from ssd_export.runtime.ort_runner import OrtRunner

pytestmark = pytest.mark.skipif(
    not multiplies_int8_exactly(),
    reason="needs int8 products without saturation (VNNI, ARM)",
)
NUM_IMAGES = 28


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of scenes, as generate --save-tokens writes them."""
    path = tmp_path_factory.mktemp("samples") / "tokens.npy"
    np.save(path, np.stack([encode_scene(scene) for scene in draw_scenes(NUM_IMAGES, 3)]))
    return path


@pytest.fixture(scope="module")
def bundle(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with an int8 decoder."""
    spec = ExportSpec(
        out=tmp_path_factory.mktemp("int8") / "b", decoder_weights="int8", decoder_samples=samples
    )
    return export_bundle(spec)


def test_other_scenes_keep_the_least_psnr(bundle: Path) -> None:
    """Images that calibration has not seen, against the float decoder of the same bundle."""
    opened = open_bundle(bundle)
    measured = opened.config.int8_decoder
    assert measured is not None and measured.psnr >= LEAST_DECODER_PSNR
    assert measured.num_samples == NUM_IMAGES - NUM_IMAGES // 4
    fast, exact = OrtRunner(opened), OrtRunner(opened, exact=True)
    assert fast.decodes_in_int8 and not exact.decodes_in_int8
    found = []
    for scene in draw_scenes(8, 77):
        codes = encode_scene(scene)[None].astype(np.int32)
        found.append(psnr(fast.decode_image(codes)[0], exact.decode_image(codes)[0]))
    assert min(found) >= LEAST_DECODER_PSNR and max(found) < 90  # int8 has been at work


def test_with_operators_the_image_is_as_good(
    bundle: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms keep the least PSNR, and neither is nearer to float32 by more than 1 dB: what they
    differ by is what roundings at a tie make of rounding errors.
    """
    opened = open_bundle(bundle)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    fused, exact = OrtRunner(opened), OrtRunner(opened, exact=True)
    portable = OrtRunner(opened, uses_operators=False)
    assert fused.decodes_by_operators and fused.decodes_in_int8
    assert portable.decodes_in_int8 and not portable.decodes_by_operators
    apart = []
    for scene in draw_scenes(8, 77):
        codes = encode_scene(scene)[None].astype(np.int32)
        own, other, wanted = (one.decode_image(codes)[0] for one in (fused, portable, exact))
        assert psnr(own, wanted) >= LEAST_DECODER_PSNR
        apart.append(psnr(own, wanted) - psnr(other, wanted))
        assert psnr(own, other) >= LEAST_DECODER_PSNR and not np.array_equal(own, wanted)
    assert abs(np.mean(apart)) < 1


def test_a_bundle_without_the_fused_graph_is_read(
    bundle: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bundles of before have it: the int8 decoder of ordinary operators."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    opened = open_bundle(bundle)
    files = {name: file for name, file in opened.files.items() if "int8_fused" not in name}
    runner = OrtRunner(replace(opened, manifest=replace(opened.manifest, files=files)))
    assert runner.decodes_in_int8 and not runner.decodes_by_operators
    assert runner.decode_image(np.zeros((1, 576), np.int32)).shape == (1, 96, 96, 3)


@pytest.mark.parametrize("name", ["image_decoder_int8.onnx", "image_decoder_int8_fused.onnx"])
def test_images_of_a_batch_do_not_meet(
    name: str, bundle: Path, samples: Path, library: Path
) -> None:
    options = ort.SessionOptions()
    add_operators(options, library)
    session = ort.InferenceSession(
        str(bundle / "onnx" / name), options, providers=["CPUExecutionProvider"]
    )
    codes = np.load(samples)[:3].astype(np.int32)
    (together,) = session.run(None, {"codes": codes})
    for image, grid in zip(together, codes, strict=True):
        (alone,) = session.run(None, {"codes": grid[None]})
        assert np.array_equal(alone[0], image)


def test_a_processor_that_saturates_decodes_in_float_and_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ort_runner, "multiplies_int8_exactly", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert not OrtRunner(open_bundle(bundle)).decodes_in_int8
    assert "images are decoded in float" in caplog.text


def test_too_few_decibels_are_refused(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_decoder, "LEAST_DECODER_PSNR", 95.0)
    checkpoint = open_checkpoint(find_model("demo").folder)
    stages: list[tuple[int, int]] = []
    with pytest.raises(UserError, match=r"keeps \d\d\.\d dB, and 95 are asked for: use --decoder"):
        int8_decoder.make_int8_decoder(
            tmp_path, checkpoint, samples, lambda stage, done, total: stages.append((done, total))
        )
    assert stages[-1][0] == stages[-1][1]


def test_a_config_speaks_of_the_graph_that_is_there(bundle: Path) -> None:
    """Neither the graph without its measurement nor the other way round is read."""
    values = json.loads((bundle / "ssd_config.json").read_text())
    without = {**values, "int8_decoder": None}
    with pytest.raises(UserError, match="image_decoder_int8"):
        parse_config(json.dumps(without).encode(), "here")
    graphs = {name: spec for name, spec in values["graphs"].items() if "int8" not in name}
    with pytest.raises(UserError, match="one named image_decoder_int8"):
        parse_config(json.dumps({**values, "graphs": graphs}).encode(), "here")
    far = {**values, "int8_decoder": {**values["int8_decoder"], "psnr": 12.0}}
    with pytest.raises(UserError, match=r"int8_decoder\.psnr"):
        parse_config(json.dumps(far).encode(), "here")


def test_four_small_convolutions_are_a_doubling_and_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 5, 4, generator=generator)
    weight = torch.randn(2, 3, 3, 3, generator=generator)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    for row in (0, 1):
        for column in (0, 1):
            taps = torch.from_numpy(phase(phase(weight.numpy(), row, 2), column, 3))
            padded = F.pad(x, (1 - column, column, 1 - row, row))
            found = F.conv2d(padded, taps)
            torch.testing.assert_close(found, wanted[:, :, row::2, column::2])


def test_scales_are_those_of_the_numbers() -> None:
    """Codes times scales are the convolution, to the rounding of its weights and bias."""
    random = np.random.RandomState(0)
    weight, bias = random.randn(4, 6, 3, 3), random.randn(4)
    seen = Range(
        low=np.full(6, -0.28),
        high=np.linspace(1, 20, 6),
        mean=random.rand(6),
        out_low=-random.rand(4) * 9,
        out_high=random.rand(4) * 30,
    )
    into, out = InputScale.of(seen), OutputScale.of(seen)
    made = QuantizedWeights.of(weight, bias, seen, into, out)
    own = (into.scale / into.common)[None, :, None, None]
    scale = (made.scale * out.scale)[:, None, None, None]
    assert np.abs(made.codes * scale / own - weight).max() <= (0.51 * scale / own).max()
    assert (made.codes.max(axis=(1, 2, 3)) <= 127).all() and made.codes.dtype == np.int8
    greatest = np.round(seen.high / into.scale) + into.zero_point
    assert greatest.max() <= 255 and greatest.max() > 200
    for end in (seen.out_low, seen.out_high):
        assert ((end / out.scale + out.zero_point + 1 >= 0) & (end / out.scale <= 256)).all()


def test_a_quarter_of_the_images_is_held_out(samples: Path) -> None:
    config = open_checkpoint(find_model("demo").folder).config
    parts = calibration_grids(config, samples)
    assert [len(part) for part in parts] == [21, 7]
    assert np.array_equal(np.concatenate(parts), np.load(samples))


def test_without_images_nothing_is_calibrated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run ssd-export generate with 32 prompts"):
        export_bundle(ExportSpec(out=tmp_path / "b", decoder_weights="int8"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array", "holds no array"),
        (np.zeros((5, 7), np.int32), "no grids of"),
        (np.zeros((5, 576)), "holds float64 and no codes"),
        (np.zeros((LEAST_IMAGES - 1, 576), np.int32), "holds 19 images"),
        (np.full((LEAST_IMAGES, 576), 1 << 20), "codes outside 0"),
        (None, "cannot read"),
    ],
)
def test_samples_that_are_none_are_named(
    tmp_path: Path, content: bytes | np.ndarray | None, message: str
) -> None:
    path = tmp_path / "samples.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    spec = ExportSpec(out=tmp_path / "b", decoder_weights="int8", decoder_samples=path)
    with pytest.raises(UserError, match=message):
        export_bundle(spec)
    assert not (tmp_path / "b").exists()
