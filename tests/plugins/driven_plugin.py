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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.dtypes import of_torch
from ssd_export.export.functions import AttentionNode
from ssd_export.kernels.decode_attention import (
    CONSTANTS,
    NUM_WARPS,
    SCALARS,
    constants,
    decode_attention_kernel,
)
from ssd_export.kernels.image import KernelImage, Variant
from ssd_export.policy.table import GroupPolicy, HeadGroup, pinned_bits

STREAM = 0x77
IMAGE = b"\x7fELF" + bytes(range(1, 120))
INT32, FLOAT32, INT8, CHAR = 5, 1, 3, 6  # of PluginFieldType
TENSORRT_TYPES = {"float32": 0, "float16": 1, "int32": 3, "bfloat16": 7}  # of DataType
SHARED_BYTES = 4096
MAX_SLOTS = 2048
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
    """What the next launch should be given. pointers: by parameter, None for a null pointer."""

    pointers: dict[str, Tensor | None]
    scalars: dict[str, int | float]
    sizes: list[int]
    constants: dict[str, int]


@dataclass
class Launches:
    """Compares and runs what the fake driver is told. wrong: what differed."""

    expected: Expected | None = None
    count: int = 0
    images: list[bytes] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def load(self, image: int) -> None:
        """An image was loaded."""
        self.images.append(ctypes.string_at(image, len(IMAGE)))

    def launch(self, function: int, sizes: Any, stream: int, arguments: Any) -> int:
        """A kernel was launched: 0, or 1 where something is not as it should be."""
        try:
            wanted, self.count = self.expected, self.count + 1
            assert wanted is not None
            self._compare("grid, block, shared", sizes[:7], wanted.sizes)
            self._compare("stream", stream, STREAM)
            names = [n for n in decode_attention_kernel.arg_names if n not in CONSTANTS]
            for place, name in enumerate(names):
                self._compare_argument(name, arguments[place], wanted)
            for place in range(len(names), len(names) + 2):
                self._compare("scratch", _pointer(arguments[place]), None)
            if not self.wrong:
                _interpret(wanted)
        except Exception as error:  # C cannot be raised through
            self.wrong.append(f"{type(error).__name__}: {error}")
        return int(bool(self.wrong))

    def _compare_argument(self, name: str, address: int, wanted: Expected) -> None:
        if name in SCALARS:
            kind = ctypes.c_float if name == "score_decay" else ctypes.c_int32
            given = kind.from_address(address).value
            self._compare(name, given, kind(wanted.scalars[name]).value)
            return
        tensor = wanted.pointers[name]
        self._compare(name, _pointer(address), None if tensor is None else tensor.data_ptr())

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

    def refuse(self, call: str, result: int = 1) -> None:
        """Lets a function of the driver fail; "": none."""
        self.cuda.fake_refuse(ctypes.c_char_p(call.encode()), result)

    def attach(self, fields: dict[str, int | float | str | bytes]) -> int | None:
        """The plugin of a node of these attributes, in an engine's context; None: refused."""
        values = [_field_data(value) for value in fields.values()]
        array = (PluginField * len(fields))(
            *(
                PluginField(name.encode(), ctypes.cast(data, ctypes.c_void_p), kind, length)
                for name, (data, kind, length) in zip(fields, values, strict=True)
            )
        )
        library = ctypes.c_void_p(self._library._handle)
        return self._host.host_attached(library, array, len(fields))

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
        address = None if workspace is None else workspace.data_ptr()
        pointers = ctypes.c_void_p(address), ctypes.c_void_p(STREAM)
        return self._host.host_enqueue(*_call(plugin, inputs, outputs), *pointers)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: GroupState,
        policy: GroupPolicy,
        prompt_length: Tensor,
        position: Tensor,
    ) -> Tensor:
        """cache.attention.decode_attention by the plugin."""
        token = [part.contiguous() for part in (query, key, value)]
        group = policy.group
        fields = fields_of(group, query, policy.score_decay, policy.grid_width)
        plugin = self._attached_once(
            json.dumps({k: v for k, v in fields.items() if k != "kernel_image"}), fields
        )
        lengths = [position.to(torch.int32), prompt_length.to(torch.int32)]
        caches = [state.key, state.value, state.position, state.score][: 3 + group.rule.by_score]
        inputs, outputs = [*token, *lengths, *caches], [torch.empty_like(token[0]), *caches]
        assert self.set_shapes(plugin, inputs, outputs) == 0
        elements = self.workspace_bytes(plugin, inputs, outputs) // 4
        workspace = torch.full((elements,), float("nan")) if elements else None
        self.launches.expected = expected_launch(
            inputs, outputs, workspace, group, policy.score_decay, policy.grid_width
        )
        assert self.enqueue(plugin, inputs, outputs, workspace) == 0, self.launches.wrong
        return outputs[0]

    def _attached_once(self, name: object, fields: dict[str, Any]) -> int:
        if name not in self._attached:
            plugin = self.attach(fields)
            assert plugin is not None
            self._attached[name] = plugin
        return self._attached[name]


def fields_of(
    group: HeadGroup, query: Tensor, score_decay: float, grid_width: int
) -> dict[str, Any]:
    """The attributes of a node with a kernel attached."""
    heads, dtype = query.shape[1], of_torch(query.dtype).name
    node = AttentionNode(
        group.rule,
        group.num_slots,
        group.num_heads,
        group.evict_every,
        score_decay,
        heads // group.num_heads,
        query.shape[2],
        dtype,
        True,
        grid_width,
    )
    image = KernelImage(
        target=75,
        variant=Variant(dtype, query.shape[2]),
        kernel_name="decode_attention_kernel",
        num_warps=NUM_WARPS,
        shared_bytes=SHARED_BYTES,
        block_slots=32,
        max_slots=MAX_SLOTS,
        ptx_version=80,
        ptx="",
        ptx_sha256="",
        cubin="",
        cubin_sha256="",
    )
    return node.attributes() | image.attributes(IMAGE)


def expected_launch(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    workspace: Tensor | None,
    group: HeadGroup,
    score_decay: float,
    grid_width: int,
) -> Expected:
    """What the kernel's source says its parameters are, from the tensors."""
    query, key, value, position, prompt_length, *caches = inputs
    rows, query_heads, head_dim = query.shape
    rule = group.rule
    pointers = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "position_ptr": position,
        "prompt_length_ptr": prompt_length,
        "cache_key_ptr": caches[0],
        "cache_value_ptr": caches[1],
        "cache_position_ptr": caches[2],
        "cache_score_ptr": caches[3] if rule.by_score else None,
        "logits_ptr": workspace,
        "out_ptr": outputs[0],
    }
    scalars = {
        "query_stride": query_heads * head_dim,
        "key_stride": group.num_heads * head_dim,
        "value_stride": group.num_heads * head_dim,
        "num_heads": group.num_heads,
        "query_group_size": query_heads // group.num_heads,
        "num_slots": group.num_slots,
        "num_sinks": rule.num_sinks,
        "num_recent": rule.num_recent,
        "by_score": int(rule.by_score),
        "pinned_columns": pinned_bits(rule.pinned_columns),
        "grid_width": grid_width,
        "age_quota": int(rule.age_quota),
        "evict_every": group.evict_every,
        "score_decay": score_decay,
    }
    sizes = [rows * group.num_heads, 1, 1, 32 * NUM_WARPS, 1, 1, SHARED_BYTES]
    compiled_in = constants(head_dim, group.num_slots, query.element_size())
    return Expected(pointers, scalars, sizes, compiled_in)


def _interpret(wanted: Expected) -> None:
    absent = torch.empty(0, dtype=torch.float32)
    pointers = [absent if tensor is None else tensor for tensor in wanted.pointers.values()]
    decode_attention_kernel[(wanted.sizes[0],)](
        *pointers, *wanted.scalars.values(), **wanted.constants, num_warps=NUM_WARPS
    )


def _pointer(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value


def _field_data(value: int | float | str | bytes) -> tuple[Any, int, int]:
    """As the ONNX parser hands them over: a string's length counts its terminating zero."""
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
