"""The C++ plugin driven without TensorRT and without a GPU: a small host stands in for the first, a
fake libcuda.so.1 for the second.

The fake driver hands every launch to `Launches`, which compares all its arguments with what the
kernel should be given and then runs the kernel's source in Triton's interpreter on that memory: so
an enqueue has the result that the compiled kernel would have. Needs TRITON_INTERPRET=1 and the
folder of the fake driver on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.dtypes import of_torch
from ssd_export.export.functions import AttentionNode
from ssd_export.export.plugin_flavor import OF_GROUPS, OF_LAYER, SETTLE, STEP, WINDOW, NodeKind
from ssd_export.kernels.compile import kernel_arguments
from ssd_export.kernels.constants import MAX_SPLITS, NUM_WARPS, combining, constants, splits
from ssd_export.kernels.image import (
    ATTEND,
    EVICT,
    KERNELS,
    LAYER,
    NODE_KERNELS,
    PART,
    SUM,
    WRITE,
    KernelCode,
    KernelImage,
    Variant,
)
from ssd_export.kernels.layer_attention import decode_layer_kernel
from ssd_export.kernels.layer_groups import LayerNumbers
from ssd_export.kernels.split_attention import attend_split_kernel, combine_splits_kernel
from ssd_export.kernels.window_attention import (
    attend_window_kernel,
    evict_window_kernel,
    write_window_kernel,
)
from ssd_export.policy.presets import MAX_GROUPS
from ssd_export.policy.table import GroupPolicy

STREAM = 0x77
SOURCES = {
    LAYER: decode_layer_kernel,
    PART: attend_split_kernel,
    SUM: combine_splits_kernel,
    EVICT: evict_window_kernel,
    ATTEND: attend_window_kernel,
    WRITE: write_window_kernel,
}
IMAGES = {name: b"\x7fELF" + name.encode().ljust(119, b".") for name in KERNELS}
SHARED_BYTES = {LAYER: 4096, PART: 5120, SUM: 2048, EVICT: 1024, ATTEND: 3072, WRITE: 512}
INT32, FLOAT32, INT8, CHAR = 5, 1, 3, 6  # of PluginFieldType
TENSORRT_TYPES = {"float32": 0, "float16": 1, "int32": 3, "bfloat16": 7}  # of DataType
MAX_SLOTS = 2048
ALIGNMENT = 16  # that the kernels are compiled for
OnLoad = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
OnLaunch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


class PluginField(ctypes.Structure):
    """nvinfer1::PluginField."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class HostTensor(ctypes.Structure):
    """Tensor of launcher/host.cpp."""

    _fields_ = (
        ("dims", ctypes.c_int64 * 8),
        ("num_dims", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


@dataclass
class Expected:
    """What the launches of a step should be given.

    tensors: by parameter, None for a null pointer, a tuple by head group; numbers: alike; kept:
    bytes of each array in the workspace, by parameter; programs: rows x heads;
    num_splits: 1 for a launch of the layer's kernel; queries: of a head, of all places of a window.
    """

    tensors: dict[str, Any]
    numbers: dict[str, Any]
    kept: dict[str, tuple[torch.dtype, int]]
    workspace: Tensor | None
    programs: int
    num_splits: int
    constants: dict[str, int]
    queries: int = 1
    given: dict[str, int] = field(default_factory=dict)  # where the plugin put its arrays

    def grid(self, name: str) -> tuple[int, int, int]:
        """Programs of a kernel."""
        return (self.programs, {PART: self.num_splits, ATTEND: self.queries}.get(name, 1), 1)


@dataclass
class Launches:
    """Compares and runs what the fake driver is told. wrong: what differed; images, kernels: what
    was loaded and launched, in order; interprets: whether kernels are run.
    """

    expected: Expected | None = None
    images: list[bytes] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    interprets: bool = True

    def load(self, image: int) -> None:
        """An image was loaded."""
        self.images.append(ctypes.string_at(image, len(IMAGES[LAYER])))

    def launch(self, function: int, sizes: Any, stream: int, arguments: Any) -> int:
        """A kernel was launched: 0, or 1 where something is not as it should be."""
        try:
            wanted, image = self.expected, self.images[function - 1]  # modules are numbered
            name = next(name for name in KERNELS if IMAGES[name] == image)
            self.kernels.append(name)
            assert wanted is not None
            threads, shared = 32 * NUM_WARPS, SHARED_BYTES[name]
            launched = [*wanted.grid(name), threads, 1, 1, shared]
            self._compare(f"{name}: grid, block, shared", sizes[:7], launched)
            self._compare("stream", stream, STREAM)
            for place, argument in enumerate(kernel_arguments(name)):
                self._compare_argument(argument["name"], arguments[place], wanted)
            if not self.wrong and self.interprets:
                _interpret(name, wanted)
        except Exception as error:  # C cannot be raised through
            self.wrong.append(f"{type(error).__name__}: {error}")
        return int(bool(self.wrong))

    def _compare_argument(self, argument: str, address: int, wanted: Expected) -> None:
        name, _, place = argument.rstrip("]").partition("[")
        if name in wanted.kept:
            self._compare_kept(name, _pointer(address), wanted)
            return
        is_number = name in wanted.numbers
        value = wanted.numbers[name] if is_number else wanted.tensors[name]
        value = value[int(place)] if place else value
        if is_number:
            kind = ctypes.c_float if name == "score_decay" else ctypes.c_int32
            self._compare(argument, kind.from_address(address).value, kind(value).value)
            return
        self._compare(argument, _pointer(address), None if value is None else value.data_ptr())

    def _compare_kept(self, name: str, address: int | None, wanted: Expected) -> None:
        """Arrays in the workspace are inside, apart and aligned, and the same in both launches."""
        num_bytes = wanted.kept[name][1]
        if not num_bytes:
            return
        assert wanted.workspace is not None
        start = wanted.workspace.data_ptr()
        end = start + wanted.workspace.numel()
        if address is None or address % ALIGNMENT or not start <= address <= end - num_bytes:
            self.wrong.append(f"{name} of {num_bytes} bytes is at {address}, not {start} to {end}")
            return
        for other, place in wanted.given.items():
            is_apart = address >= place + wanted.kept[other][1] or place >= address + num_bytes
            if other != name and not is_apart:
                self.wrong.append(f"{name} is at {address}, {other} at {place}")
        self._compare(name, address, wanted.given.setdefault(name, address))

    def _compare(self, name: str, given: object, wanted: object) -> None:
        if given != wanted:
            self.wrong.append(f"{name} is {given}, not {wanted}")


class DrivenPlugin:
    """The library, its host and the fake driver of one process.

    Args: folder: holds libcuda.so.1 and host.so.
    """

    def __init__(self, library: Path, folder: Path) -> None:
        self.cuda = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self.cuda.fake_set_context.argtypes = [ctypes.c_void_p]
        self.launches = Launches()
        self._listeners = OnLoad(self.launches.load), OnLaunch(self.launches.launch)
        self.cuda.fake_listen(*self._listeners)
        self.use_context(1)
        self._library = ctypes.CDLL(str(library))
        self._host = ctypes.CDLL(str(folder / "host.so"))
        self._host.host_attached.restype = ctypes.c_void_p
        self._host.host_workspace.restype = ctypes.c_int64
        self._attached: dict[object, int] = {}

    def use_context(self, number: int) -> None:
        """Makes a CUDA context current; 0: none."""
        self.cuda.fake_set_context(number or None)

    def use_multiprocessors(self, number: int) -> None:
        """What the GPU of contexts that are not loaded into yet has."""
        self.cuda.fake_set_multiprocessors(number)

    def refuse(self, call: str, result: int = 1) -> None:
        """Lets a function of the driver fail; "": none."""
        self.cuda.fake_refuse(ctypes.c_char_p(call.encode()), result)

    def attach(self, fields: dict[str, Any], kind: NodeKind = STEP) -> int | None:
        """The plugin of a node of these attributes, in an engine's context; None: refused."""
        values = [_field_data(value) for value in fields.values()]
        array = (PluginField * len(fields))(
            *(
                PluginField(name.encode(), ctypes.cast(data, ctypes.c_void_p), kind, length)
                for name, (data, kind, length) in zip(fields, values, strict=True)
            )
        )
        library = ctypes.c_void_p(self._library._handle)
        return self._host.host_attached(library, kind.op_type.encode(), array, len(fields))

    def destroy(self, plugin: int) -> None:
        """As with its engine's context."""
        self._host.host_destroy(ctypes.c_void_p(plugin))

    def workspace_bytes(
        self, plugin: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> int:
        """What the plugin asks for at these sizes."""
        return self._host.host_workspace(*_call(plugin, inputs, outputs))

    def set_shapes(self, plugin: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        """onShapeChange: 0, or -1 after a message."""
        return self._host.host_shapes(*_call(plugin, inputs, outputs))

    def enqueue(
        self,
        plugin: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
    ) -> int:
        """enqueue: 0, or -1 after a message."""
        address = None if workspace is None or not len(workspace) else workspace.data_ptr()
        pointers = ctypes.c_void_p(address), ctypes.c_void_p(STREAM)
        return self._host.host_enqueue(*_call(plugin, inputs, outputs), *pointers)

    def layer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        states: Sequence[GroupState],
        policies: Sequence[GroupPolicy],
        prompt_length: Tensor,
        position: Tensor,
        num_multiprocessors: int = 1,
    ) -> Tensor:
        """cache.attention.decode_layer by the plugin."""
        heads = torch.cat([query, key, value], dim=1)
        fields = fields_of(policies, query)
        plugin = self._attached_once(fields, num_multiprocessors)
        caches = caches_of_node(states, policies)
        lengths = [position.to(torch.int32), prompt_length.to(torch.int32)]
        inputs, outputs = [heads, *lengths, *caches], [torch.empty(query.shape).to(query), *caches]
        assert self.set_shapes(plugin, inputs, outputs) == 0
        workspace = self.workspace(plugin, inputs, outputs)
        self.launches.expected = expected = expected_launches(
            inputs, outputs, workspace, states, policies, num_multiprocessors
        )
        assert self.enqueue(plugin, inputs, outputs, workspace) == 0, self.launches.wrong
        wanted = [LAYER] if expected.num_splits == 1 else [PART, SUM]
        assert self.launches.kernels[-len(wanted) :] == wanted
        return outputs[0]

    def attention(self, num_multiprocessors: int, *given: Any) -> Tensor:
        """cache.attention.decode_attention by the plugin: a layer of one group."""
        *token, state, policy, prompt_length, position = given
        return self.layer(*token, [state], [policy], prompt_length, position, num_multiprocessors)

    def window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        states: Sequence[GroupState],
        policies: Sequence[GroupPolicy],
        prompt_length: Tensor,
        position: Tensor,
        active: Tensor,
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """kernels.window_attention.attend_layer_window by the plugin."""
        window = DrivenWindow(query, key, value, states, policies)
        window.of_rows(position=position, prompt_length=prompt_length, active=active)
        self.enqueue_window(window, WINDOW)

        def write(counts: Tensor) -> None:
            window.of_rows(counts=counts)
            self.enqueue_window(window, SETTLE)

        return window.tensors["out"], write

    def enqueue_window(self, window: DrivenWindow, kind: NodeKind) -> None:
        """A node of a window, which has to launch each of its kernels once."""
        plugin = self._attached_once(fields_of(window.policies, window.query, kind), 1, kind)
        inputs, outputs = window.inputs(kind), window.outputs(kind)
        assert self.set_shapes(plugin, inputs, outputs) == 0
        assert self.workspace_bytes(plugin, inputs, outputs) == 0
        self.launches.expected = window.expected()
        assert self.enqueue(plugin, inputs, outputs, None) == 0, self.launches.wrong
        wanted = list(NODE_KERNELS[kind.op_type])
        assert self.launches.kernels[-len(wanted) :] == wanted

    def workspace(self, plugin: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """As much as the plugin asks for at these sizes, not a byte more, full of NaN."""
        num_bytes = self.workspace_bytes(plugin, inputs, outputs)
        return torch.full((-(-num_bytes // 4),), float("nan")).view(torch.uint8)[:num_bytes]

    def _attached_once(
        self, fields: dict[str, Any], num_multiprocessors: int, kind: NodeKind = STEP
    ) -> int:
        plain = {name: value for name, value in fields.items() if not isinstance(value, bytes)}
        key = json.dumps([plain, num_multiprocessors, kind.op_type])
        if key not in self._attached:
            self.use_multiprocessors(num_multiprocessors)
            plugin = self.attach(fields, kind)
            assert plugin is not None
            self._attached[key] = plugin
        return self._attached[key]


class DrivenWindow:
    """The tensors of the two nodes of a window. query [B, H*G, W, D]; key, value [B, H, W, D]."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        states: Sequence[GroupState],
        policies: Sequence[GroupPolicy],
    ) -> None:
        self.states, self.policies = states, policies
        heads = torch.cat([query, key, value], dim=1)
        parts = [query.shape[1], key.shape[1], key.shape[1]]
        self.query, self.key, self.value = heads.split(parts, dim=1)
        ranked = [policy.group.num_slots for policy in policies if policy.group.rule.by_score]
        self.kept = max(ranked, default=0)
        of_queries = query.shape[:3]
        self.tensors = {
            "heads": heads,
            "out": torch.empty(query.shape, dtype=query.dtype),
            "logits": torch.full((*of_queries, self.kept + query.shape[2]), float("nan")),
            "largest": torch.empty(of_queries),
            "total": torch.empty(of_queries),
        }

    def of_rows(self, **given: Tensor) -> None:
        """Takes numbers of rows."""
        self.tensors |= {name: values.to(torch.int32) for name, values in given.items()}

    def inputs(self, kind: NodeKind) -> list[Tensor]:
        """Of a node."""
        return [*(self.tensors[name] for name in kind.inputs), *self._caches()]

    def outputs(self, kind: NodeKind) -> list[Tensor]:
        """Of a node."""
        return [*(self.tensors[name] for name in kind.outputs), *self._caches()]

    def expected(self) -> Expected:
        """What the kernels of both nodes should be given."""
        numbers = LayerNumbers.of(self.query, self.key, self.value, self.policies)
        rows, num_heads, num_places, head_dim = self.key.shape
        own = {f"{name}_ptr": tensor for name, tensor in self.tensors.items() if name != "heads"}
        own |= {"query_ptr": self.query, "key_ptr": self.key, "value_ptr": self.value}
        return Expected(
            tensors=own | cache_tensors(self.states, self.policies),
            numbers={**vars(numbers), "num_places": num_places, "kept_slots": self.kept},
            kept={},
            workspace=None,
            programs=rows * num_heads,
            num_splits=1,
            constants=constants(head_dim, numbers.most_slots, self.query.element_size()),
            queries=numbers.query_group_size * num_places,
        )

    def _caches(self) -> list[Tensor]:
        return caches_of_node(self.states, self.policies)


def caches_of_node(states: Sequence[GroupState], policies: Sequence[GroupPolicy]) -> list[Tensor]:
    """In the order of a node's inputs."""
    return [
        cache
        for state, policy in zip(states, policies, strict=True)
        for cache in (state.key, state.value, state.position, state.score)[
            : 3 + policy.group.rule.by_score
        ]
    ]


def cache_tensors(states: Sequence[GroupState], policies: Sequence[GroupPolicy]) -> dict[str, Any]:
    """The caches that a kernel should be given, by group, and the null pointers at its end."""
    padded = [*states, *[states[0]] * (MAX_GROUPS - len(states))]
    scored = [policy.group.rule.by_score for policy in policies]
    scored += [scored[0]] * (MAX_GROUPS - len(scored))
    return {
        "cache_keys": tuple(state.key for state in padded),
        "cache_values": tuple(state.value for state in padded),
        "cache_positions": tuple(state.position for state in padded),
        "cache_scores": tuple(
            state.score if is_scored else None
            for state, is_scored in zip(padded, scored, strict=True)
        ),
        "global_scratch": None,
        "profile_scratch": None,
    }


def fields_of(
    policies: Sequence[GroupPolicy], query: Tensor, kind: NodeKind = STEP
) -> dict[str, Any]:
    """The attributes of a layer's node with kernels attached."""
    dtype, head_dim = of_torch(query.dtype).name, query.shape[-1]
    num_heads = sum(policy.group.num_heads for policy in policies)
    nodes = [
        AttentionNode(
            policy.group.rule,
            policy.group.num_slots,
            policy.group.num_heads,
            policy.group.evict_every,
            policy.score_decay,
            query.shape[1] // num_heads,
            head_dim,
            dtype,
            True,
            policy.grid_width,
        ).attributes()
        for policy in policies
    ]
    of_layer = {name: nodes[0][name] for name in OF_LAYER}
    of_groups = {name: [int(node.get(name, 0)) for node in nodes] for name in OF_GROUPS}
    return of_layer | of_groups | image_of(dtype, head_dim).attributes(IMAGES, kind.op_type)


def image_of(dtype: str, head_dim: int) -> KernelImage:
    """Kernels that were never compiled."""
    codes = {
        name: KernelCode(SOURCES[name].__name__, SHARED_BYTES[name], "", "", "", "")
        for name in KERNELS
    }
    blocks = constants(head_dim, MAX_SLOTS, 4)["BLOCK_SLOTS"]
    return KernelImage(
        75, Variant(dtype, head_dim), NUM_WARPS, blocks, MAX_SLOTS, MAX_SPLITS, 80, codes
    )


def expected_launches(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    workspace: Tensor | None,
    states: Sequence[GroupState],
    policies: Sequence[GroupPolicy],
    num_multiprocessors: int = 1,
) -> Expected:
    """What the kernels' sources say their parameters are, from the tensors."""
    heads, position, prompt_length = inputs[:3]
    rows, query_heads, head_dim = outputs[0].shape
    num_heads = (heads.shape[1] - query_heads) // 2
    query, key, value = heads.split([query_heads, num_heads, num_heads], dim=1)
    numbers = LayerNumbers.of(query, key, value, policies)
    slots, programs = numbers.most_slots, rows * num_heads
    compiled_in = constants(head_dim, slots, query.element_size())
    num_splits = splits(programs, -(-slots // compiled_in["BLOCK_SLOTS"]), num_multiprocessors)
    is_scored = any(policy.group.rule.by_score for policy in policies)
    parts = rows * query_heads * num_splits
    kept = {
        "present_ptr": (torch.int32, 4 * programs * slots),
        "score_ptr": (torch.float32, 4 * programs * slots),
        "logits_ptr": (torch.float32, 4 * rows * query_heads * slots),
        "sums_ptr": (torch.float32, 4 * parts * head_dim),
        "largest_ptr": (torch.float32, 4 * parts),
        "total_ptr": (torch.float32, 4 * parts),
    }
    if num_splits == 1:
        kept = {"logits_ptr": (torch.float32, 4 * programs * slots * is_scored)}
    return Expected(
        tensors={
            "query_ptr": query,
            "key_ptr": key,
            "value_ptr": value,
            "position_ptr": position,
            "prompt_length_ptr": prompt_length,
            "out_ptr": outputs[0],
            **cache_tensors(states, policies),
        },
        numbers={**vars(numbers), "num_splits": num_splits},
        kept=kept,
        workspace=workspace,
        programs=programs,
        num_splits=num_splits,
        constants=compiled_in,
    )


def _interpret(name: str, wanted: Expected) -> None:
    kernel = SOURCES[name]
    absent = torch.empty(0, dtype=torch.float32)
    given: dict[str, Any] = dict(wanted.numbers)
    for parameter, tensor in wanted.tensors.items():
        of_groups = tensor if isinstance(tensor, tuple) else (tensor,)
        present = tuple(absent if one is None else one for one in of_groups)
        given[parameter] = present if isinstance(tensor, tuple) else present[0]
    for parameter, (dtype, num_bytes) in wanted.kept.items():
        given[parameter] = absent
        if num_bytes:
            assert wanted.workspace is not None
            first = wanted.given[parameter] - wanted.workspace.data_ptr()
            given[parameter] = wanted.workspace[first : first + num_bytes].view(dtype)
    given |= combining(wanted.constants) if name == SUM else wanted.constants
    grid = wanted.grid(name)
    kernel[grid](**{key: given[key] for key in kernel.arg_names}, num_warps=NUM_WARPS)


def _pointer(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value


def _field_data(value: int | float | str | bytes | list[int]) -> tuple[Any, int, int]:
    """As the ONNX parser hands them over: a string's length counts its terminating zero."""
    if isinstance(value, list):
        return (ctypes.c_int32 * len(value))(*value), INT32, len(value)
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value)), INT8, len(value)
    if isinstance(value, str):
        return ctypes.create_string_buffer(value.encode()), CHAR, len(value) + 1
    if isinstance(value, float):
        return ctypes.pointer(ctypes.c_float(value)), FLOAT32, 1
    return ctypes.pointer(ctypes.c_int32(value)), INT32, 1


def _call(plugin: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    tensors = [
        HostTensor(
            (ctypes.c_int64 * 8)(*tensor.shape),
            tensor.dim(),
            TENSORRT_TYPES[of_torch(tensor.dtype).name],
            tensor.data_ptr(),
        )
        for tensor in (*inputs, *outputs)
    ]
    array = (HostTensor * len(tensors))(*tensors)
    return ctypes.c_void_p(plugin), array, len(inputs), len(outputs)
