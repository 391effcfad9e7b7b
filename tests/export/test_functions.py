"""The DecodeAttention function and the eviction nodes in ONNX Runtime, against the oracle, case by
case.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssd_export.export.functions import DOMAIN, AttentionNode, attention_function, eviction_nodes
from ssd_export.export.operators import IR_VERSION, OPSET, Operators, onnx_dtype
from tests.cases import CASES, INT8_CASES, Case, assert_matches_oracle, inputs


class OrtBackend:
    """One head group: its node alone in a graph, and a graph that evicts before it where R7
    wants that.
    """

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.data, self.dtype = case, inputs(case), dtype
        evicts = case.num_slots < case.prompt_slots + case.grid.num_tokens
        self.node = AttentionNode(
            case.rule,
            case.num_slots,
            case.num_heads,
            case.evict_every,
            case.score_decay,
            case.query_group_size,
            case.head_dim,
            dtype,
            evicts,
            case.grid_width,
            case.kv_dtype,
        )
        self.step_session = _session(self._step_model())
        self.evict_session = (
            _session(self._evict_model()) if evicts and case.evict_every > 1 else None
        )

    def prefill(self) -> tuple[np.ndarray, np.ndarray | None]:
        case, data = self.case, self.data
        shape = (case.rows, case.num_heads, case.num_slots)
        held = np.arange(case.num_slots) < data.prompt_length[:, None, None]
        self.state = {
            "past_key": np.zeros((*shape, case.head_dim), self.dtype),
            "past_value": np.zeros((*shape, case.head_dim), self.dtype),
            "past_position": np.broadcast_to(
                np.where(held, np.arange(case.num_slots), -1), shape
            ).astype(np.int32),
            "past_score": np.zeros(shape, np.float32),
        }
        span = slice(0, case.prompt_slots)
        prompt = {"past_key": data.prompt_key, "past_value": data.prompt_value}
        if case.kv_dtype == "int8":
            for part in ("past_key", "past_value"):
                codes, scale = _quantized(prompt[part])
                self.state[part], self.state[f"{part}_scale"] = (
                    np.zeros((*shape, case.head_dim), np.int8),
                    np.zeros(shape, np.float32),
                )
                prompt[part], self.state[f"{part}_scale"][:, :, span] = codes, scale
        for part, rows in prompt.items():
            self.state[part][:, :, span] = rows
        self.state["past_score"][:, :, span] = _prompt_scores(case, data)
        return self.state["past_position"], self.state["past_score"]

    def step(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        position = self.data.prompt_length + index
        given = {"position": position.astype(np.int32), "prompt_length": self.data.prompt_length}
        if self.evict_session is not None:
            self._run(self.evict_session, given)
        out = self._run(
            self.step_session,
            given
            | {
                "query": self.data.query[index].astype(self.dtype),
                "key": self.data.key[index].astype(self.dtype),
                "value": self.data.value[index].astype(self.dtype),
            },
        )
        return out.astype(np.float32), self.state["past_position"], self.state["past_score"]

    def _run(
        self, session: ort.InferenceSession, given: dict[str, np.ndarray]
    ) -> np.ndarray | None:
        names = [output.name for output in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        feeds = {name: array for name, array in (given | self.state).items() if name in wanted}
        results = dict(zip(names, session.run(names, feeds), strict=True))
        for name in names:
            if name.startswith("present_"):
                self.state["past_" + name.removeprefix("present_")] = results[name]
        return results.get("out")

    def _values(self) -> dict[str, ir.Value]:
        case, group = self.case, ("B", self.case.num_heads, self.case.num_slots)
        shapes = {
            "query": (self.dtype, ("B", case.num_heads * case.query_group_size, case.head_dim)),
            "key": (self.dtype, ("B", case.num_heads, case.head_dim)),
            "value": (self.dtype, ("B", case.num_heads, case.head_dim)),
            "position": ("int32", ("B",)),
            "prompt_length": ("int32", ("B",)),
            **{
                f"past_{part}": (
                    "int8" if case.kv_dtype == "int8" else self.dtype,
                    (*group, case.head_dim),
                )
                for part in ("key", "value")
            },
            **(
                {f"past_{part}_scale": ("float32", group) for part in ("key", "value")}
                if case.kv_dtype == "int8"
                else {}
            ),
            "past_position": ("int32", group),
            "past_score": ("float32", group),
        }
        return {
            name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(onnx_dtype(dtype)))
            for name, (dtype, shape) in shapes.items()
        }

    def _step_model(self) -> ir.Model:
        values = self._values()
        if not self.case.rule.by_score:
            del values["past_score"]
        parts = [name.removeprefix("past_") for name in values if name.startswith("past_")]
        ops = Operators()
        results = ops.many(
            "DecodeAttention_0",
            *values.values(),
            domain=DOMAIN,
            num_outputs=1 + len(parts),
            **self.node.attributes(),
        )
        names = ["out", *(f"present_{part}" for part in parts)]
        for value, name in zip(results, names, strict=True):
            like = values["query" if name == "out" else name.replace("present", "past")]
            value.name, value.shape, value.type = name, like.shape, like.type
        function = self._function()
        graph = ir.Graph(
            list(values.values()),
            results,
            nodes=ops.tape.nodes,
            opset_imports={"": function.opset_imports[""], DOMAIN: 1},
            name="step",
        )
        return ir.Model(graph, ir_version=IR_VERSION, functions=[function])

    def _function(self) -> ir.Function:
        return attention_function(self.node, "DecodeAttention_0")

    def _evict_model(self) -> ir.Model:
        values = self._values()
        ops = Operators()
        score = values["past_score"] if self.case.rule.by_score else None
        position, scaled = eviction_nodes(
            ops,
            self.node,
            values["position"],
            values["prompt_length"],
            values["past_position"],
            score,
        )
        given = [values[name] for name in ("position", "prompt_length", "past_position")] + (
            [score] if score else []
        )
        outputs = [(position, "present_position")] + (
            [(scaled, "present_score")] if scaled is not None else []
        )
        for value, name in outputs:
            like = values[name.replace("present", "past")]
            value.name, value.shape, value.type = name, like.shape, like.type
        graph = ir.Graph(
            given,
            [value for value, _ in outputs],
            nodes=ops.tape.nodes,
            opset_imports={"": OPSET},
            name="evict",
        )
        return ir.Model(graph, ir_version=IR_VERSION)


def _quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 and scales float32 of rows [..., D], as the prefill graph gives them."""
    scale = np.abs(rows).max(axis=-1)
    return np.rint(
        rows * (np.float32(127) / np.maximum(scale, np.float32(1e-30)))[..., None]
    ).astype(np.int8), scale


def _session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _prompt_scores(case: Case, data: object) -> np.ndarray:
    """[B, H, P] in float64 numpy: what every prompt token received from those after it and
    itself.
    """
    query = data.prompt_query.reshape(
        case.rows, case.num_heads, -1, case.prompt_slots, case.head_dim
    )
    logits = np.einsum("bhgtd,bhsd->bhgts", query, data.prompt_key).astype(np.float64) / np.sqrt(
        case.head_dim
    )
    logits[..., np.triu(np.ones((case.prompt_slots, case.prompt_slots), bool), 1)] = -np.inf
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    is_prompt = np.arange(case.prompt_slots) < data.prompt_length[:, None]
    return np.einsum("bhgts,bt->bhs", probs, is_prompt)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES + INT8_CASES, ids=lambda case: case.name)
def test_function_matches_the_oracle_slot_for_slot(case: Case, dtype: str) -> None:
    assert_matches_oracle(case, OrtBackend(case, dtype), dtype)


def test_function_node_carries_what_the_plugin_reads() -> None:
    backend = OrtBackend(CASES[9], "float32")
    (node,) = backend._step_model().graph
    assert {
        name: attribute.value for name, attribute in node.attributes.items()
    } == backend.node.attributes()
