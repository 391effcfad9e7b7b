"""The builder's listing of a finished engine: its layers, what each reads and writes, and what
orders them.

TensorRT-RTX prints it while it builds with detailed verbosity: one line a layer, profile after
profile, in the order in which the layers are queued on several streams. TensorRT prints the kinds
of the layers alone; nothing can be checked there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

ITEM_BYTES = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int32": 4, "Int64": 8, "Int8": 1, "UInt8": 1, "Bool": 1,
    "Int4": 0.5, "FP8": 1, "E4M3FP8": 1,
}  # fmt: skip
TENSOR = re.compile(
    r"\{ Name: (?P<name>[^{}]*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[^\]]*)\]"
    r"[^{}]*?Datatype: (?P<dtype>\w+)"
)
OTHER_KIND = re.compile(r"^Layer\((\w+)\)", re.MULTILINE)  # TensorRT's own form
PROFILE = re.compile(r" \[profile (\d+)\]")
REGION = re.compile(r"_myl(\d+)_\d+$")  # a part of the network that one compiler run made


@dataclass(frozen=True)
class Operand:
    """A tensor that a layer reads or writes; -1 in shape: a size that varies."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> float:
        """Bytes of the tensor. Raises: KeyError for a dtype that is not known here."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Layer:
    """A layer of an engine. kind: kgen, gemm, PluginV3, signal, wait, ...; stream and event: what
    orders it.
    """

    name: str
    kind: str
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()
    stream: int = 0
    event: int | None = None

    def reads(self, tensor: str) -> bool:
        """Whether the layer reads a tensor."""
        return any(operand.name == tensor for operand in self.inputs)

    def writes(self, tensor: str) -> bool:
        """Whether the layer writes a tensor."""
        return any(operand.name == tensor for operand in self.outputs)


def parse_listing(text: str, num_profiles: int = 1) -> list[list[Layer]]:
    """The layers of each profile; empty where the builder listed nothing."""
    entries = text.split("\nName: ")[1:]
    layers = [_layer(PROFILE.sub("", entry)) for entry in entries]
    layers = layers or [Layer("", kind) for kind in OTHER_KIND.findall(text)]
    if num_profiles == 1 or not layers:
        return [layers] * bool(layers)
    numbers = _profiles(entries, layers)
    return [
        [layer for layer, profile in zip(layers, numbers, strict=True) if profile == number]
        for number in sorted(set(numbers))
    ]


def _profiles(entries: Sequence[str], layers: Sequence[Layer]) -> list[int]:
    """The profile of each layer: as its tensors are marked, else one for each compiler run."""
    if not any(PROFILE.search(entry) for entry in entries):
        runs = [int(found[1]) if (found := REGION.search(layer.name)) else 0 for layer in layers]
        places = sorted(set(runs))
        return [places.index(run) for run in runs]
    numbers, current = [], 0
    for entry in entries:
        current = max([current, *map(int, PROFILE.findall(entry))])
        numbers.append(current)
    return numbers


def _layer(entry: str) -> Layer:
    def tensors(heading: str) -> tuple[Operand, ...]:
        start = entry.find(f", {heading}: [")
        if start < 0:
            return ()
        part = entry[start : _end_of_list(entry, start)]
        return tuple(_operand(found) for found in TENSOR.finditer(part))

    kind = re.search(r", LayerType: ([^,]*)", entry)
    stream, event = re.search(r", StreamId: (\d+)", entry), re.search(r", EventId: (\d+)", entry)
    return Layer(
        entry.split(", LayerType: ")[0],
        kind[1] if kind else "",
        tensors("Inputs") + tensors("Constants"),
        tensors("Outputs"),
        int(stream[1]) if stream else 0,
        int(event[1]) if event else None,
    )


def _operand(found: re.Match[str]) -> Operand:
    shape = tuple(int(size) for size in found["shape"].split(",") if size.strip())
    return Operand(found["name"], shape, found["dtype"])


def _end_of_list(text: str, start: int) -> int:
    """The place behind the bracket that closes the first one after start."""
    depth = 0
    for place in range(text.index("[", start), len(text)):
        depth += {"[": 1, "]": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


def hazards(layers: Sequence[Layer], aliases: Mapping[str, str]) -> list[str]:
    """Reads of a buffer that another layer, or the same one, may have overwritten by then.

    Args: aliases: output -> the input whose memory it overwrites. Every layer that reads the input
    has to end before one that writes the output begins: earlier on the same stream, or by a signal
    that the writer's stream has waited for. A layer that does both is safe only where it carries
    the input over unchanged (a pure copy onto itself, or a scatter whose input the builder has
    renamed to the output).
    """
    before = _ancestors(layers)
    found = []
    for output, past in aliases.items():
        writers = [place for place, layer in enumerate(layers) if layer.writes(output)]
        for reader in (place for place, layer in enumerate(layers) if layer.reads(past)):
            for writer in writers:
                if reader == writer and _is_copy(layers[reader], past, output):
                    continue
                if reader == writer or reader not in before[writer]:
                    found.append(_hazard(layers[reader], layers[writer], past))
    return found


def _is_copy(layer: Layer, past: str, output: str) -> bool:
    """Whether a layer is nothing but a copy of that input to that output."""
    return [o.name for o in layer.inputs] == [past] and [o.name for o in layer.outputs] == [output]


def _hazard(reader: Layer, writer: Layer, past: str) -> str:
    if reader is writer:
        return f"{reader.name} reads {past} and overwrites it in the same kernel"
    return (
        f"{reader.name} (stream {reader.stream}) reads {past}, which {writer.name} (stream"
        f" {writer.stream}) overwrites"
    )


def _ancestors(layers: Sequence[Layer]) -> list[set[int]]:
    """Places of the layers that have ended when each layer begins."""
    before: list[set[int]] = []
    last_of: dict[int, int] = {}
    signals: dict[int, int] = {}
    for place, layer in enumerate(layers):
        direct = [last_of[layer.stream]] if layer.stream in last_of else []
        if layer.kind == "wait" and layer.event in signals:
            direct.append(signals[layer.event])
        if layer.kind == "signal" and layer.event is not None:
            signals[layer.event] = place
        before.append(set(direct).union(*(before[other] for other in direct)))
        last_of[layer.stream] = place
    return before


def unordered_dependencies(layers: Iterable[Layer]) -> list[str]:
    """Reads of a result that nothing orders after its writer: none in a listing that is
    understood.
    """
    layers = list(layers)
    writer: dict[str, int] = {}
    before, found = _ancestors(layers), []
    for place, layer in enumerate(layers):
        for operand in layer.inputs:
            made = writer.get(operand.name)
            if made is not None and made not in before[place]:
                found.append(f"{layer.name} reads {operand.name} of {layers[made].name}")
        writer |= {operand.name: place for operand in layer.outputs}
    return found
