"""Makes a TensorRT network that is ready to build from a bundle's graph: parsed, weights lifted
out, shapes bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.messages import Messages, one_line
from ssd_export.tensorrt.profiles import Profile


def parse_graph(
    trt: Any, logger: Any, messages: Messages, path: Path, model: bytes | None
) -> tuple[Any, Any, Any]:
    """(builder, network, parser) of a graph; hold on to all three while the network is used.

    Args: model: an edited ModelProto that takes the place of the file at path, whose folder still
    has its weights.
    Raises: UserError with the parser's first reason.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path)) if model is None else parser.parse(model, str(path))
    if not parsed:
        reasons = messages.errors or [
            parser.get_error(index).desc() for index in range(parser.num_errors)
        ]
        raise UserError(
            f"TensorRT cannot read {path} ({one_line(next(iter(reasons), 'no reason given'))});"
            " export the bundle again, or use --plugin off"
        )
    return builder, network, parser


def strongly_typed(trt: Any) -> int:
    """Creation flags: precisions are the graph's. TensorRT 11 knows nothing else and may lack the
    flag.
    """
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    return 0 if flag is None else 1 << int(flag)


def lift_weights(trt: Any, network: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Turns the constants of these names and shapes into inputs of the network; returns those that
    were found.

    The weights are then bound when the engine is run, and two engines can be given the same ones.
    Measured with TensorRT-RTX: the layers of the engine stay the same, their constants disappear
    from it.
    """
    inputs = {}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:  # the parser names a constant's layer after the initializer
        if layer.type == trt.LayerType.CONSTANT and shapes.get(layer.name) == tuple(
            layer.get_output(0).shape
        ):
            constant = layer.get_output(0)
            inputs[constant.name] = network.add_input(layer.name, constant.dtype, constant.shape)
    for layer in layers:
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None and tensor.name in inputs:
                layer.set_input(index, inputs[tensor.name])
    return sorted(tensor.name for tensor in inputs.values())


def optimization_profile(
    builder: Any, spec: GraphSpec, profile: Profile, rows_per_image: int
) -> Any:
    """One profile of an engine: bounds for every input that has a named dimension. spec: with the
    engine's shapes.
    """
    bounds = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if any(isinstance(dimension, str) for dimension in tensor.shape):
            sizes = [profile.sizes(dimension, rows_per_image) for dimension in tensor.shape]
            bounds.set_shape(
                tensor.name, *[tuple(size[point] for size in sizes) for point in range(3)]
            )
    return bounds


def check_interface(spec: GraphSpec, network: Any, weights: Iterable[str]) -> None:
    """Raises ValueError (a bug) where the network's inputs and outputs are not those of the
    contract.
    """
    for kind, wanted, given in (
        (
            "inputs",
            {t.name for t in spec.inputs} | set(weights),
            {network.get_input(i).name for i in range(network.num_inputs)},
        ),
        (
            "outputs",
            {t.name for t in spec.outputs},
            {network.get_output(i).name for i in range(network.num_outputs)},
        ),
    ):
        if wanted != given:
            raise ValueError(
                f"{spec.name}: the network's {kind} differ from the contract in"
                f" {sorted(wanted ^ given)}"
            )
