"""The form of the decode step for TensorRT, in ONNX Runtime: the oracle's tokens in the oracle's
slots, case by case, and the tokens of the bundle's own form.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.export.functions import DOMAIN
from ssd_export.export.kv_update import OPSET, kv_update_function, kv_update_model
from ssd_export.tensorrt.step_form import KV_UPDATE, engine_spec
from tests.cases import CASES, Case, assert_matches_oracle
from tests.export.test_functions import OrtBackend
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file

CACHES = ("past_key", "past_value", "present_key", "present_value")


class KvUpdateBackend(OrtBackend):
    """Caches stand in one row for each head of each row: [B*H, 1, S, D]."""

    def _function(self) -> ir.Function:
        return kv_update_function(self.node, "DecodeAttention_0")

    def _values(self) -> dict[str, ir.Value]:
        values = super()._values()
        for name in CACHES[:2]:
            values[name].shape = ir.Shape(("cells", 1, self.case.num_slots, self.case.head_dim))
        return values

    def _run(
        self, session: ort.InferenceSession, given: dict[str, np.ndarray]
    ) -> np.ndarray | None:
        for name in CACHES[:2]:
            cells = self.state[name].reshape(-1, 1, self.case.num_slots, self.case.head_dim)
            self.state[name] = cells
        return super()._run(session, given)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_form_matches_the_oracle_slot_for_slot(case: Case, dtype: str) -> None:
    assert_matches_oracle(case, KvUpdateBackend(case, dtype), dtype)


@pytest.fixture(scope="module", params=["ssd-row", "full"])
def made(request: pytest.FixtureRequest) -> Bundle:
    model = checkpoint(TinyJanus(seed=3, num_kv_heads=2))
    return open_bundle(bundle(model, request.param, 0.2, head_map=str(head_map_file(model))))


def test_a_bundle_s_decode_step_takes_the_form(made: Bundle) -> None:
    before = ir.load(made.file("onnx/decode_step.onnx"))
    contract = made.config.graphs["decode_step"]
    spec = engine_spec(contract, KV_UPDATE)
    shapes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    after = kv_update_model(before, made.config, shapes)
    assert after.opset_imports[""] == OPSET and before.opset_imports[""] < OPSET
    nodes = [node for node in after.graph if node.domain == DOMAIN]
    assert len(nodes) == sum(len(groups) for groups in made.config.policy.layers)
    bodies = {node.op_type: after.functions[node.op_identifier()] for node in nodes}
    for body in bodies.values():
        kinds = [node.op_type for node in body]
        assert kinds.count("TensorScatter") == 2 and "ScatterND" not in kinds
    slots = {name: group.num_slots for name, group in _caches(made)}
    for value in after.graph.inputs:
        if value.name in slots:
            assert value.shape[1] == 1 and value.shape[2] == slots[value.name]
    assert {v.name for v in after.graph.inputs} == {v.name for v in before.graph.inputs}


def _caches(made: Bundle) -> list[tuple[str, object]]:
    return [
        (cache.past, made.config.policy.layers[cache.layer][cache.group])
        for cache in made.config.graphs["decode_step"].cache_inputs
        if cache.kind in ("key", "value")
    ]
