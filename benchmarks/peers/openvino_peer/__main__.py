"""A stateful Llama of OpenVINO's own operators, as optimum-intel's export ends up.

python -m benchmarks.peers.openvino_peer build FOLDER NUM_LAYERS FORMAT...
python -m benchmarks.peers.openvino_peer MODEL.xml NUM_IMAGES NUM_THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op

from benchmarks.peers import shape
from benchmarks.peers.protocol import serve

GROUP = 128
BATCHED_CONTEXT = 32  # tokens that fill the caches at once


class LlamaBuilder:
    """Inputs, states and weights of a model, as its layers need them."""

    def __init__(self) -> None:
        head = [-1, 1, -1, shape.HEAD_DIM]
        shapes = {
            "inputs_embeds": [-1, -1, shape.HIDDEN_SIZE],
            "cos": head,
            "sin": head,
            "mask": [-1, 1, -1, -1],
        }
        self.inputs = {name: self._input(name, size, ov.Type.f32) for name, size in shapes.items()}
        self.inputs["beam_idx"] = self._input("beam_idx", [-1], ov.Type.i32)
        self.states: list[Any] = []
        self._numbers = count()
        batch = op.gather(
            op.shape_of(self.inputs["inputs_embeds"], output_type="i64"),
            op.constant([0]),
            op.constant(0),
        )
        size = op.concat(
            [
                batch,
                op.constant([shape.NUM_HEADS]),
                op.constant([0]),
                op.constant([shape.HEAD_DIM]),
            ],
            0,
        )
        self._empty = op.broadcast(op.constant(np.float32(0)), size)

    @staticmethod
    def _input(name: str, size: list[int], dtype: Any) -> Any:
        node = op.parameter(size, dtype, name=name)
        node.output(0).set_names({name})
        return node

    def model(self, num_layers: int) -> ov.Model:
        """The whole model: logits of the codebook from embedded inputs."""
        x = self.inputs["inputs_embeds"]
        for layer in range(num_layers):
            x = self._layer(x, layer)
        logits = op.result(self._linear(self._rms_norm(x), shape.CODEBOOK_SIZE, shape.HIDDEN_SIZE))
        logits.output(0).set_names({"logits"})
        return ov.Model([logits], self.states, list(self.inputs.values()), "llama")

    def _layer(self, x: Any, layer: int) -> Any:
        hidden, inner = shape.HIDDEN_SIZE, shape.INTERMEDIATE_SIZE
        normed = self._rms_norm(x)
        query, key, value = (self._heads(self._linear(normed, hidden, hidden)) for _ in range(3))
        keys = self._state(f"{layer}.key", self._rope(key))
        values = self._state(f"{layer}.value", value)
        scale = op.constant(np.float32(shape.HEAD_DIM**-0.5))
        attended = op.scaled_dot_product_attention(
            self._rope(query), keys, values, self.inputs["mask"], scale, causal=False
        )
        merged = op.reshape(
            op.transpose(attended, op.constant([0, 2, 1, 3])),
            op.constant([0, 0, hidden]),
            special_zero=True,
        )
        x = op.add(x, self._linear(merged, hidden, hidden))
        normed = self._rms_norm(x)
        gate, up = (self._linear(normed, inner, hidden) for _ in range(2))
        return op.add(x, self._linear(op.multiply(op.swish(gate), up), hidden, inner))

    def _linear(self, x: Any, num_outputs: int, num_inputs: int) -> Any:
        weights = op.constant(shape.random_matrix(num_outputs, num_inputs, next(self._numbers)))
        return op.matmul(x, weights, False, True)

    @staticmethod
    def _rms_norm(x: Any) -> Any:
        two, eps = (np.full((1, 1, 1), value, np.float32) for value in (2, shape.RMS_NORM_EPS))
        mean = op.reduce_mean(
            op.power(x, op.constant(two)), op.constant(np.array([-1])), keep_dims=True
        )
        normed = op.divide(x, op.sqrt(op.add(mean, op.constant(eps))))
        return op.multiply(op.constant(np.ones((1, 1, shape.HIDDEN_SIZE), np.float32)), normed)

    @staticmethod
    def _heads(x: Any) -> Any:
        split = op.reshape(
            x, op.constant([0, 0, shape.NUM_HEADS, shape.HEAD_DIM]), special_zero=True
        )
        return op.transpose(split, op.constant([0, 2, 1, 3]))

    def _rope(self, x: Any) -> Any:
        one, axis, half = op.constant([1]), op.constant([3]), shape.HEAD_DIM // 2
        first = op.slice(x, op.constant([0]), op.constant([half]), one, axis)
        second = op.slice(x, op.constant([half]), op.constant([shape.HEAD_DIM]), one, axis)
        minus = op.constant(np.full((1, 1, 1, 1), -1, np.float32))
        turned = op.concat([op.multiply(second, minus), first], -1)
        return op.add(op.multiply(x, self.inputs["cos"]), op.multiply(turned, self.inputs["sin"]))

    def _state(self, name: str, new: Any) -> Any:
        info = ov.op.util.VariableInfo()
        info.data_shape = ov.PartialShape([-1, shape.NUM_HEADS, -1, shape.HEAD_DIM])
        info.data_type, info.variable_id = ov.Type.f32, f"past_key_values.{name}present.{name}"
        variable = ov.op.util.Variable(info)
        past = op.gather(
            op.read_value(self._empty, variable), self.inputs["beam_idx"], op.constant(0)
        )
        grown = op.concat([past, new], 2)
        self.states.append(op.assign(grown, variable))
        return grown


def build(folder: Path, num_layers: int, formats: list[str]) -> None:
    """Writes FOLDER/<format>.xml for each of fp32, int8 and int4."""
    folder.mkdir(parents=True, exist_ok=True)
    model = LlamaBuilder().model(num_layers)
    for format in formats:
        made = model
        if format != "fp32":
            import nncf

            made = {
                "int8": lambda: nncf.compress_weights(
                    model.clone(), mode=nncf.CompressWeightsMode.INT8_SYM
                ),
                "int4": lambda: nncf.compress_weights(
                    model.clone(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP
                ),
            }[format]()
        ov.save_model(made, folder / f"{format}.xml", compress_to_fp16=False)


def open_model(path: str, num_images: int, num_threads: int) -> Callable[[], object]:
    """A decode step of two rows an image."""
    settings = {
        "INFERENCE_NUM_THREADS": num_threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    rows = 2 * num_images
    for start in range(0, shape.CONTEXT, BATCHED_CONTEXT):
        request.infer(_feeds(rows, BATCHED_CONTEXT, start))
    places = count(shape.CONTEXT)
    return lambda: request.infer(
        _feeds(rows, 1, next(places)), share_inputs=True, share_outputs=True
    )


def _feeds(rows: int, num_tokens: int, past: int) -> dict[str, np.ndarray]:
    """Inputs of num_tokens tokens after `past` ones."""
    places = np.arange(past, past + num_tokens)
    inverse = shape.ROPE_THETA ** (-np.arange(0, shape.HEAD_DIM, 2) / shape.HEAD_DIM)
    angles = np.concatenate([np.outer(places, inverse)] * 2, -1).astype(np.float32)[None, None]
    visible = np.arange(past + num_tokens)[None, :] <= places[:, None]
    mask = np.where(visible, 0, -1e9).astype(np.float32)[None, None]

    def every_row(one: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(one, (rows, *one.shape[1:])))

    return {
        "inputs_embeds": shape.random_rows(rows, num_tokens, shape.HIDDEN_SIZE),
        "cos": every_row(np.cos(angles)),
        "sin": every_row(np.sin(angles)),
        "mask": every_row(mask),
        "beam_idx": np.arange(rows, dtype=np.int32),
    }


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        serve(lambda: open_model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
