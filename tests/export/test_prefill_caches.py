"""The prefill that writes into caches, in ONNX Runtime: keys and values of the bundle's own prefill
in the first slots, zeros behind a prompt's end, and nothing else touched.
"""

from __future__ import annotations

import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.export.prefill_caches import prefill_into_caches
from ssd_export.graph_spec import CacheTensor, TensorSpec
from ssd_export.tensorrt.step_form import KV_UPDATE, engine_contract, engine_spec, num_elements
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file

LENGTHS = (5, 9, 1, 9)
SIZES = {"images": 2, "rows": 4, "prompt_tokens": 9}
BEFORE = 7.0  # what every slot holds


@pytest.fixture(scope="module", params=["ssd-row", "full"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = checkpoint(TinyJanus(seed=3, num_kv_heads=2))
    whole = bundle(model, request.param, 0.2, head_map=str(head_map_file(model)))
    return open_bundle(shutil.copytree(whole, tmp_path_factory.mktemp("prefill") / "bundle"))


def inputs(made: Bundle, graph: str) -> dict[str, np.ndarray]:
    """Inputs of the bundle's own prefill."""
    random = np.random.default_rng(0)
    sampling = {"temperature": np.ones(2), "cfg_scale": np.full(2, 5.0), "top_k": np.array([3, 0])}
    given = {
        tensor.name: sampling.get(tensor.name, random.standard_normal(tensor.sizes(SIZES)))
        for tensor in made.config.graphs[graph].inputs
    } | {"prompt_length": np.array(LENGTHS)}
    return {
        tensor.name: given[tensor.name].astype(tensor.dtype)
        for tensor in made.config.graphs[graph].inputs
    }


def run(made: Bundle, model: ir.Model, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    path = made.path / "onnx" / "tested.onnx"  # beside the weights
    ir.save(model, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def shape_in_cells(tensor: TensorSpec) -> tuple[int, ...]:
    first, *others = tensor.shape
    count = num_elements(TensorSpec("", tensor.dtype, (first,)), SIZES)
    return (count, *map(int, others))


@pytest.mark.parametrize("graph", ["prefill", "prefill_top_k"])
def test_the_caches_hold_the_prompts_and_nothing_else_changed(made: Bundle, graph: str) -> None:
    own = ir.load(made.file(f"onnx/{graph}.onnx"))
    contract = engine_contract(made.config.graphs, graph, is_in_place=True)
    shaped = engine_spec(contract, KV_UPDATE)
    written = prefill_into_caches(own, contract, shaped)
    assert [value.name for value in written.graph.outputs] == [t.name for t in contract.outputs]
    given = inputs(made, graph)
    wanted = run(made, own, given)
    past = {
        tensor.name: np.full(shape_in_cells(tensor), BEFORE, tensor.dtype)
        for tensor in shaped.inputs
        if tensor.name not in given
    }
    assert past.keys() == set(contract.aliases.values()) != set()
    found = run(made, written, given | past)
    assert found.keys() == wanted.keys()
    held = np.arange(SIZES["prompt_tokens"]) < np.array(LENGTHS)[:, None]
    for name, values in wanted.items():
        cache = CacheTensor.parse(name)
        if name not in contract.aliases:
            np.testing.assert_array_equal(found[name], values, name)
            continue
        assert cache is not None and cache.kind in ("key", "value")
        rows = found[name].reshape(*values.shape[:2], -1, values.shape[3])
        prompt = np.where(held[:, None, :, None], values, 0)
        np.testing.assert_array_equal(rows[:, :, : values.shape[2]], prompt, name)
        assert (rows[:, :, values.shape[2] :] == BEFORE).all(), f"{name} behind the prompts"
        assert rows.shape[2] > values.shape[2]


def test_the_bundle_s_graph_stays_as_it_is(made: Bundle) -> None:
    own = ir.load(made.file("onnx/prefill.onnx"))
    before = ir.to_proto(own).SerializeToString(deterministic=True)
    contract = engine_contract(made.config.graphs, "prefill", is_in_place=True)
    prefill_into_caches(own, contract, engine_spec(contract, KV_UPDATE))
    assert ir.to_proto(own).SerializeToString(deterministic=True) == before
