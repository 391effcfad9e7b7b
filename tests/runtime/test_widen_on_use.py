"""float16 on the CPU with matrices widened as they are used: the same numbers, and no widened copy
that stays.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.plan.memory import widens_on_use
from ssd_export.plan.sizes import WeightSizes
from ssd_export.runtime import ort_runner
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.ort_session import FOLDER_OF_WEIGHTS, open_session
from ssd_export.runtime.widen_on_use import widened_on_use
from ssd_export.verify.generation import prompt_batch
from ssd_export.verify.tolerances import TOLERANCES, error
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

TINY = TinyJanus(seed=5, num_kv_heads=2)
# qkv, o, gate_up and down of every layer, two of the aligner, two of the generation head: each
# graph's matrices
MATRICES = {"prefill": 4 * TINY.num_layers + 2, "decode_step": 4 * TINY.num_layers + 4}


def half_bundle(weights: str = "none") -> Path:
    return bundle(checkpoint(TINY), "h2o", 0.2, dtype="fp16", weights=weights)


@pytest.mark.parametrize("weights", ["none", "int4"])
def test_the_same_numbers(weights: str) -> None:
    """Logits of the prompt and of eight steps, with the same tokens before them, are as near as the
    dtype says.
    """
    opened = open_bundle(half_bundle(weights))
    batch = prompt_batch(opened, seed=7)
    on_use, at_once = (OrtRunner(opened, widen_on_use=choice) for choice in (True, False))
    for step in range(8):
        for runner in (on_use, at_once):
            runner.decode_step(step) if step else runner.prefill(batch)
        assert error(on_use.logits(), at_once.logits()) < TOLERANCES["float16"].logits
        assert np.ptp(at_once.logits()) > 1
        at_once._values["tokens"].update_inplace(np.ascontiguousarray(on_use.tokens().T))


@pytest.mark.parametrize("graph", sorted(MATRICES))
def test_no_matrix_is_widened_before_it_is_used(graph: str, tmp_path: Path) -> None:
    """ONNX Runtime's own optimized graph keeps every matrix in float16; left alone it keeps
    none.
    """
    path = half_bundle() / "onnx" / f"{graph}.onnx"
    left_alone = matrices_by_type(str(path), path.parent, tmp_path / "alone.onnx")
    rewritten = matrices_by_type(widened_on_use(path), path.parent, tmp_path / "rewritten.onnx")
    assert left_alone == {onnx.TensorProto.FLOAT: MATRICES[graph]}
    assert rewritten == {onnx.TensorProto.FLOAT16: MATRICES[graph]}


def matrices_by_type(model: str | bytes, folder: Path, optimized: Path) -> dict[int, int]:
    """How many matrices of the weights file a session holds, by type: those of the embeddings and
    of the norms are none.
    """
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(optimized)
    options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(folder))
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    counts: dict[int, int] = {}
    graph = onnx.load(optimized, load_external_data=False).graph
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for tensor in graph.initializer:
        is_weight = "layers." in tensor.name or "generation_" in tensor.name
        if is_weight and len(tensor.dims) == 2 and tensor.name not in gathered:
            counts[tensor.data_type] = counts.get(tensor.data_type, 0) + 1
    return counts


def test_a_widened_matrix_waits_for_nothing(tmp_path: Path) -> None:
    """By the profile of a step: between the cast of a matrix and its product no other matrix is
    cast.
    """
    opened = open_bundle(half_bundle())
    runner = OrtRunner(opened, profile=tmp_path / "profile", widen_on_use=True)
    runner.prefill(prompt_batch(opened, seed=7))
    runner.decode_step(1)
    events = json.loads(runner.end_profiling()["decode_step"].read_text())
    names = [
        event["name"].removesuffix("_kernel_time")
        for event in events
        if event["name"].endswith("_kernel_time")
    ]
    order = [name for name in names if name.endswith((".wide", ".product"))]
    assert len(order) == 2 * MATRICES["decode_step"]
    casts, products = order[::2], order[1::2]
    assert [name.removesuffix(".wide") for name in casts] == [
        name.removesuffix(".product") for name in products
    ]


def test_the_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(half_bundle())
    assert not OrtRunner(opened).widens_on_use
    monkeypatch.setattr(ort_runner, "total_bytes", lambda: 1 << 10)
    assert OrtRunner(opened).widens_on_use
    assert not OrtRunner(open_bundle(bundle(checkpoint(TINY), "h2o", 0.2))).widens_on_use
    seven = WeightSizes(embeddings=0, image_decoder=0, codes=0, steps=12_400_000_000)
    assert widens_on_use(seven, "float16", 24 << 30) and not widens_on_use(
        seven, "float16", 64 << 30
    )
    assert not widens_on_use(seven, "float32", 24 << 30) and not widens_on_use(
        seven, "float16", None
    )


def test_sessions_map_the_file(tmp_path: Path) -> None:
    """The weights of a rewritten graph are still beside it, not inside it."""
    path = half_bundle() / "onnx" / "decode_step.onnx"
    assert len(widened_on_use(path)) < 2 * path.stat().st_size
    assert open_session(path, "cpu", 1, widen_on_use=True).get_providers() == [
        "CPUExecutionProvider"
    ]
