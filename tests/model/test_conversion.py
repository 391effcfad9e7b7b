"""A weight that a dtype cannot hold is refused by name before it is written, whatever tensor it is
in.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ssd_export.errors import UserError
from ssd_export.export.weight_plan import plan_weights
from ssd_export.export.weights import write_weights
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.conversion import check_finite, convert
from ssd_export.model.quantization import Scheme, dequantize, quantize, to_stored
from ssd_export.policy.make import make_policy
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

HALF_MAX = 65504.0


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_what_comes_out_is_finite_or_refused(values: list[float], dtype: torch.dtype) -> None:
    source = torch.tensor(values, dtype=torch.float32)
    plain = source.to(dtype)
    harmless = bool(plain.isfinite().all()) and bool((plain != 0).any() or (source == 0).all())
    try:
        made = convert(source, dtype, "w", "start again")
    except UserError as error:
        assert not harmless, error
    else:
        assert harmless and torch.equal(made, plain)


@pytest.mark.parametrize(
    "value, dtype, words",
    [
        (1e5, torch.float16, ["file: w", "100000", "float16", "65504", "--dtype fp32 or bf16"]),
        (-1e5, torch.float16, ["-100000"]),
        (3.4e38, torch.bfloat16, ["3.4e+38", "bfloat16", "use --dtype fp32"]),
        (1e300, torch.float32, ["1e+300", "float32", "start again"]),
        (1e-9, torch.float16, ["1e-09", "becomes zero", "--dtype fp32 or bf16"]),
        (float("nan"), torch.float16, ["NaN", "start again"]),
        (float("inf"), torch.float64, ["infinite value (inf)", "start again"]),
    ],
)
def test_the_message_has_tensor_value_and_way_out(
    value: float, dtype: torch.dtype, words: list[str]
) -> None:
    source = torch.full((3, 4), 0.0, dtype=torch.float64)
    source[1, 2] = value
    with pytest.raises(UserError) as refused:
        convert(source, dtype, "file: w", "start again")
    for word in words:
        assert word in str(refused.value)


def test_rounding_down_to_the_limit_is_no_overflow() -> None:
    source = torch.tensor([65519.0])
    assert convert(source, torch.float16, "w", "").item() == HALF_MAX
    with pytest.raises(UserError):
        convert(torch.tensor([65520.0]), torch.float16, "w", "")


def test_small_values_beside_large_ones_may_vanish_and_nothing_is_no_fault() -> None:
    assert convert(torch.tensor([1e-9, 1.0]), torch.float16, "w", "").tolist() == [0.0, 1.0]
    assert convert(torch.zeros(3), torch.float16, "w", "").tolist() == [0.0] * 3
    assert convert(torch.zeros(0, 4), torch.float16, "w", "").shape == (0, 4)
    assert check_finite(torch.tensor([-2.0, 1.0]), "w", "") == (-2.0, 1.0)


@pytest.fixture(scope="module")
def checkpoint_in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_transformers_checkpoint(tmp_path_factory.mktemp("bf16") / "tiny", TinyJanus())
    state = load_file(path / "model.safetensors")
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["none", "int8", "int4"])
def test_every_tensor_of_an_export_is_checked(
    checkpoint_in_bfloat16: Path, tmp_path: Path, weights: str
) -> None:
    """One value above float16's limit, in one tensor after the other."""
    path = Path(shutil.copytree(checkpoint_in_bfloat16, tmp_path / "tiny"))
    state = load_file(path / "model.safetensors")
    names = open_checkpoint(path).names()
    for name in names:
        stored = f"model.{name}"
        changed = {**state, stored: state[stored].clone()}
        changed[stored].view(-1)[-1] = 1e5
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_checkpoint(path)
        table = make_policy("streaming-llm", checkpoint.config, budget=0.5)
        planned = plan_weights(checkpoint, table, torch.float16, weights)
        with pytest.raises(UserError, match=r"99840.*--dtype fp32 or bf16") as refused:
            for weight in planned:
                if name.split(".")[-2] in weight.name or "norm" in name or "layers" in weight.name:
                    weight.make()
        assert stored in str(refused.value)


def test_what_is_written_is_checked_whoever_made_it(tmp_path: Path) -> None:
    from ssd_export.export.journal import Journal
    from ssd_export.export.weights import Weight

    weight = Weight("w", (2,), torch.float16, lambda: torch.tensor([1.0, float("inf")]).half())
    folder = tmp_path / "b"
    folder.mkdir()
    with Journal(folder, {}, False) as journal, pytest.raises(UserError, match="w, as it would be"):
        write_weights(folder / "w", [weight], journal)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("fp8"), Scheme("int4", 16)])
def test_scales_of_tiny_weights_keep_them(scheme: Scheme) -> None:
    """float16 has no number for the scale of weights of 1e-6: they became zero without a word."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(8, 64, generator=generator) * 1e-6
    linear[3] *= 1e6
    codes, scale = quantize(linear.half(), scheme, torch.float16)
    back = dequantize(*to_stored(codes, scale, scheme)).float().T
    error = (back - linear.half().float()).norm(dim=1) / linear.norm(dim=1)
    assert error.max() < {"int8": 0.3, "fp8": 0.3, "int4": 0.5}[scheme.format]
    assert (back.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 16)])
def test_a_code_times_its_scale_is_finite_or_refused(scheme: Scheme) -> None:
    for greatest in torch.arange(50000.0, HALF_MAX + 1, 32):
        linear = torch.zeros(2, 16)
        linear[0, 3] = greatest
        try:
            codes, scale = quantize(linear.half(), scheme, torch.float16)
        except UserError as error:
            assert "--dtype fp32 or bf16" in str(error)
        else:
            assert dequantize(*to_stored(codes, scale, scheme)).isfinite().all(), greatest
