"""Part one of gpu_report: the attention kernel on the GPU that is here. Needs torch, Triton and
cuda-bindings; compute-sanitizer where it is installed.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_part import Result, Task
from benchmarks.gpu_time import Rates, median_ms
from benchmarks.kernel_check import GUARDED, KernelCase
from ssd_export.cache import attention as reference
from ssd_export.cache.state import GroupState
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from ssd_export.verify.tolerances import TOLERANCES

KERNEL_CHECK = [sys.executable, "-m", "benchmarks.kernel_check"]
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_PLACES = (
    Path("/usr/local/cuda/bin/compute-sanitizer"),
    Path("/usr/local/cuda/compute-sanitizer/compute-sanitizer"),
)
IMAGE_CASE = KernelCase("by the driver", HeadGroup(GUARDED, 180, 24, 4), head_dim=128)
IMAGE_STEPS = 30  # the cache of 180 slots is full at the eighth
IMAGE_SPLITS = 3
HEADS, HEAD_DIM = 16, 128  # Janus-Pro-1B's
BATCHES, SLOTS = (1, 8, 32, 128), (64, 180, 320, 640)
COLD_BYTES = 256 << 20  # of caches that launches take in turn: more than any GPU's second level


@dataclass(frozen=True)
class Variant:
    """A choice of how the kernels are compiled or launched. block_slots at HEAD_DIM; num_splits:
    programs for the slots of a head.
    """

    block_slots: int
    num_stages: int
    num_warps: int
    num_splits: int = 1

    def __str__(self) -> str:
        if self.num_splits > 1:
            return f"slots in {self.num_splits} parts"
        return f"{self.block_slots} slots, {self.num_stages} stages, {self.num_warps} warps"


VARIANTS = (
    Variant(16, 5, 4),  # the kernel's own
    Variant(32, 3, 4),
    Variant(32, 1, 4),
    Variant(16, 5, 8),
    Variant(32, 3, 8),
    *(Variant(16, 5, 4, num_splits) for num_splits in (2, 4, 8)),
)


def tasks(capability: int, rates: Callable[[], Rates]) -> list[Task]:
    """Tasks for a GPU of a compute capability (times ten). rates: of this GPU."""
    listed = [
        Task("kernel = reference", check_kernel_here, 90),
        Task("noise = numpy's", check_noise, 10),
        *(
            Task(
                f"image by the driver, {dtype}",
                lambda dtype=dtype: check_image(capability, dtype),
                20,
            )
            for dtype in ("float16", "bfloat16", "float32")
        ),
        *(Task(tool, lambda tool=tool: sanitize(tool), 60) for tool in SANITIZERS),
    ]
    for batch in BATCHES:
        for slots in SLOTS:
            name = f"kernel, {batch} images, {slots} slots"
            listed.append(
                Task(name, lambda batch=batch, slots=slots: time_kernel(batch, slots, rates()), 9)
            )
    return listed


def check_kernel_here() -> Result:
    """Runs the kernel's check in a separate process, so that a fault of the kernel ends that
    process.
    """
    run = subprocess.run(KERNEL_CHECK, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    if not lines:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        if "needs" in reason or "No module named" in reason:
            raise UserError(reason)
        return {"ok": False, "failures": [f"ended with {run.returncode}: {reason}"]}
    return json.loads(lines[-1])


def sanitize(tool: str) -> Result:
    """The quick kernel check under a tool of compute-sanitizer. Raises: UserError where it is not
    installed.
    """
    found = shutil.which("compute-sanitizer") or next(
        (str(place) for place in SANITIZER_PLACES if place.exists()), None
    )
    if found is None:
        raise UserError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [found, "--tool", tool, "--error-exitcode", "99", *KERNEL_CHECK, "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = [line for line in run.stdout.splitlines() if "SUMMARY" in line] or [
        f"ended with {run.returncode}"
    ]
    return {"ok": run.returncode == 0, "summary": summary[-1].strip("= ")}


def check_noise(device: str = "cuda") -> Result:
    """The noise kernel's bits against numpy's."""
    from ssd_export.noise import GumbelNoise, ImageSeed
    from ssd_export.runtime.torch_batch import fill_on_gpu

    images, codes = (ImageSeed(5, 0), ImageSeed(2**64 - 1, 3)), 16384
    noise = torch.zeros(GRID.width, len(images), codes, device=device)
    fill_on_gpu(noise, images, range(24, 48))
    wanted = GumbelNoise(images, codes)(range(24, 48))
    different = int((noise.cpu().numpy().view(np.int32) != wanted.view(np.int32)).sum())
    failures = [f"{different} of {wanted.size} numbers differ"] if different else []
    return {"ok": not failures, "failures": failures, "summary": f"{wanted.size:,} numbers"}


def check_image(
    capability: int, dtype: str, device: Any = None, case: KernelCase = IMAGE_CASE
) -> Result:
    """The kernels compiled ahead of time for this GPU, launched through the driver: each step in
    one launch and in parts, once as it is and once captured, from the same state; all against the
    reference.

    Args: device: a CudaDevice; None opens the GPU.
    """
    from ssd_export.kernels.compile import compile_kernels
    from ssd_export.kernels.image import STEP_KERNELS, read_image
    from ssd_export.tensorrt.cuda_device import CudaDevice, open_driver

    with tempfile.TemporaryDirectory() as folder:
        (image,) = compile_kernels(Path(folder), (capability,), (dtype,), (case.head_dim,))
        codes = read_image(Path(folder), image, "cubin")
        arguments = json.loads((Path(folder) / "kernels.json").read_text())["arguments"]
    opened = device or CudaDevice(open_driver())
    errors = []
    try:
        kernels = {
            name: opened.load_kernel(codes[name], image.kernels[name].name) for name in STEP_KERNELS
        }
        for step, (state, token, lengths) in enumerate(steps_of(case, dtype)):
            wanted, policy = state.copied(torch.float32), case.policy
            wide = [part.float() for part in token]
            out = reference.decode_attention(*wide, wanted, policy, lengths, lengths + step)
            for num_splits, captured in product((1, IMAGE_SPLITS), (False, True)):
                launch = _Launch(opened, kernels, image, arguments, num_splits, captured)
                ours = launch(case, state, token, lengths, step)
                errors.append(_difference(ours, out, wanted))
        for kernel in kernels.values():
            opened.unload_kernel(kernel)
    finally:
        if device is None:
            opened.close()
    return _judged(errors, dtype)


def steps_of(case: KernelCase, dtype: str) -> Iterator[tuple[GroupState, list[Tensor], Tensor]]:
    """State, token and prompt lengths of IMAGE_STEPS steps over an eviction; the state is what the
    reference in float32 left, rounded to the dtype.
    """
    numbers = torch.Generator().manual_seed(3)
    rows, group, kind = 4, case.group, DTYPES[dtype].torch
    lengths = torch.full((rows,), group.num_slots - 8, dtype=torch.int32)
    state = GroupState.empty(rows, group, case.head_dim)
    shape = (rows, group.num_heads, group.num_slots - 8, case.head_dim)
    prompt = [torch.randint(-64, 65, shape, generator=numbers) / 32 for _ in range(2)]
    scores = torch.rand(shape[:3], generator=numbers)
    reference.fill_from_prompt(state, *prompt, scores, lengths)
    for step in range(IMAGE_STEPS):
        token = [
            (torch.randint(-64, 65, (rows, heads, case.head_dim), generator=numbers) / 32).to(kind)
            for heads in (group.num_heads * case.query_group_size, *[group.num_heads] * 2)
        ]
        yield state.copied(kind), token, lengths
        reference.decode_attention(
            *(part.float() for part in token),
            state,
            case.policy,
            lengths,
            lengths + step,
        )


class _Launch:
    """The launches of a step through the driver, their memory filled before and read after."""

    def __init__(
        self,
        device: Any,
        kernels: dict[str, Any],
        image: Any,
        arguments: dict[str, list[dict[str, str]]],
        num_splits: int,
        captured: bool,
    ) -> None:
        self._device, self._kernels, self._image = device, kernels, image
        self._arguments, self._num_splits, self._captured = arguments, num_splits, captured

    def __call__(
        self, case: KernelCase, state: GroupState, token: list[Tensor], lengths: Tensor, step: int
    ) -> tuple[Tensor, GroupState]:
        out = torch.empty_like(token[0])
        tensors = {
            "query_ptr": token[0],
            "key_ptr": token[1],
            "value_ptr": token[2],
            "position_ptr": lengths + step,
            "prompt_length_ptr": lengths,
            "cache_keys": state.key,
            "cache_values": state.value,
            "cache_positions": state.position,
            "cache_scores": state.score,
            "out_ptr": out,
            **_kept(case, token[0], self._num_splits),
        }
        places = {name: self._upload(tensor) for name, tensor in tensors.items()}
        self._queue(places | numbers_of(case, token) | {"num_splits": self._num_splits})
        left = {name: self._download(places[name], tensors[name]) for name in tensors}
        for address in places.values():
            self._device.free(address)
        caches = (left[f"cache_{part}s"] for part in ("key", "value", "position", "score"))
        return left["out_ptr"], GroupState(*caches)

    def _queue(self, values: dict[str, Any]) -> None:
        programs = values["num_programs"]
        grids = {"layer": (programs, 1)}
        if self._num_splits > 1:
            grids = {"part": (programs, self._num_splits), "sum": (programs, 1)}

        def launch() -> None:
            for name, grid in grids.items():
                self._start(name, grid, values)

        if self._captured:
            graph = self._device.capture(launch)
            self._device.launch(graph)
            self._device.destroy(graph)
        else:
            launch()

    def _start(self, name: str, grid: tuple[int, int], values: dict[str, Any]) -> None:
        arguments = self._arguments[name]
        self._device.launch_kernel(
            self._kernels[name],
            grid,
            32 * self._image.num_warps,
            tuple(_value_of(argument["name"], values) for argument in arguments),
            tuple(_ctype(argument["type"]) for argument in arguments),
            self._image.kernels[name].shared_bytes,
        )

    def _upload(self, tensor: Tensor) -> int:
        array = bits_of(tensor)
        address = self._device.allocate(array.nbytes)
        self._device.upload(address, array)
        return address

    def _download(self, address: int, like: Tensor) -> Tensor:
        array = bits_of(like)
        read = self._device.download(address, array.shape, array.dtype)
        return torch.from_numpy(read).view(like.dtype)


def numbers_of(case: KernelCase, token: list[Tensor]) -> dict[str, Any]:
    """The kernels' numbers for a layer of one group, and how many programs there are."""
    from ssd_export.kernels.layer_groups import LayerNumbers

    numbers = LayerNumbers.of(*token, [case.policy])
    return {**vars(numbers), "num_programs": len(token[0]) * case.group.num_heads}


def _kept(case: KernelCase, query: Tensor, num_splits: int) -> dict[str, Tensor]:
    """What the launches of a step keep for one another."""
    rows, query_heads, head_dim = query.shape
    slots = (rows, case.group.num_heads, case.group.num_slots)
    parts = (rows, query_heads, num_splits)
    return {
        "present_ptr": torch.zeros(slots, dtype=torch.int32),
        "score_ptr": torch.zeros(slots),
        "logits_ptr": torch.zeros(rows, query_heads, case.group.num_slots),
        "sums_ptr": torch.zeros(*parts, head_dim),
        "largest_ptr": torch.zeros(parts),
        "total_ptr": torch.zeros(parts),
    }


def _value_of(argument: str, values: dict[str, Any]) -> int | float:
    """The value of an argument; "name[1]": of the second head group. 0 is a null pointer."""
    name, _, place = argument.rstrip("]").partition("[")
    value = values.get(name, 0)
    return value[int(place)] if isinstance(value, tuple) else value


def bits_of(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array; bfloat16 as integers."""
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return np.ascontiguousarray(plain.numpy())


def _ctype(kind: str) -> Any:
    if kind == "null" or kind.startswith("*"):
        return ctypes.c_void_p
    return {"int32": ctypes.c_int32, "float32": ctypes.c_float}[kind]


def _difference(
    ours: tuple[Tensor, GroupState], out: Tensor, wanted: GroupState
) -> dict[str, float | bool]:
    state = ours[1]
    empty = wanted.position < 0
    score = (state.score - wanted.score).masked_fill(empty, 0).abs() / wanted.score.clamp(min=1)
    return {
        "slots": torch.equal(state.position, wanted.position),
        "caches": torch.equal(state.key.float(), wanted.key),
        "out": (ours[0].float() - out).abs().max().item(),
        "score": score.max().item(),
    }


def _judged(errors: list[dict[str, float | bool]], dtype: str) -> Result:
    out, score = (max(error[name] for error in errors) for name in ("out", "score"))
    failures = [
        f"{name} differ" for name in ("slots", "caches") if not all(e[name] for e in errors)
    ]
    if not out <= TOLERANCES[dtype].kernel or not score <= TOLERANCES["float32"].op:
        failures.append(f"greatest errors: output {out:.1e}, scores {score:.1e}")
    summary = f"{len(errors)} launches, half of them captured; output {out:.1e}, scores {score:.1e}"
    return {"ok": not failures, "failures": failures, "summary": summary}


def time_kernel(
    batch: int,
    slots: int,
    rates: Rates,
    device: str = "cuda",
    variants: tuple[Variant, ...] = VARIANTS,
    launch: Callable[..., None] | None = None,
) -> Result:
    """Milliseconds of one layer's attention, every variant of the kernel and torch's own beside
    the time that reading its caches takes. Caches hold random numbers, and launches take so many in
    turn that none is found in the GPU's second level.
    """
    rows = 2 * batch
    group = HeadGroup(Rule(-1, 0, True), slots, 1, HEADS)
    of_one = 2 * rows * HEADS * slots * HEAD_DIM * 2
    states = [
        _full_state(rows, group, device) for _ in range(max(1, min(64, COLD_BYTES // of_one)))
    ]
    token = [
        torch.randn(rows, HEADS, HEAD_DIM, device=device, dtype=torch.float16) for _ in range(3)
    ]
    lengths = torch.full((rows,), 4, dtype=torch.int32, device=device)
    timed, start = {}, launch or launch_variant
    for variant in variants:
        call = lambda state, variant=variant: start(variant, token, state, group, lengths)  # noqa: E731
        timed[str(variant)] = median_ms(
            [lambda state=state, call=call: call(state) for state in states]
        )
    query = token[0][:, :, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    timed["torch's attention, nothing written"] = median_ms(
        [lambda state=state: sdpa(query, state.key, state.value) for state in states]
    )
    bound = 1000 * of_one / rates.read_bandwidth
    return {"ms": timed, "bound_ms": bound, "bytes": of_one}


def _full_state(rows: int, group: HeadGroup, device: str) -> GroupState:
    shape = (rows, group.num_heads, group.num_slots)
    key, value = (torch.randn(*shape, HEAD_DIM, device=device).to(torch.float16) for _ in range(2))
    position = torch.arange(group.num_slots, dtype=torch.int32, device=device)
    return GroupState(
        key, value, position.expand(shape).contiguous(), torch.rand(shape, device=device)
    )


def launch_variant(
    variant: Variant, token: list[Tensor], state: GroupState, group: HeadGroup, lengths: Tensor
) -> None:
    """One step of the cache by a variant, as a layer of one group: a launch of the kernel with
    other constants, or with the slots in parts.
    """
    from ssd_export.kernels.constants import constants
    from ssd_export.kernels.layer_attention import decode_layer, decode_layer_kernel
    from ssd_export.kernels.layer_groups import LayerNumbers, caches_of

    query, key, value = token
    policy, position = GroupPolicy(group, 1.0, GRID.width), lengths + group.num_slots
    if variant.num_splits > 1:
        decode_layer(query, key, value, [state], [policy], lengths, position, variant.num_splits)
        return
    rows, num_heads, head_dim = key.shape
    compiled_in = constants(head_dim, group.num_slots, query.element_size())
    compiled_in |= {"BLOCK_SLOTS": variant.block_slots, "NUM_STAGES": variant.num_stages}
    decode_layer_kernel[(rows * num_heads,)](
        query,
        key,
        value,
        position,
        lengths,
        *caches_of([state]),
        torch.empty(state.position.shape, device=query.device),
        torch.empty_like(query),
        **vars(LayerNumbers.of(query, key, value, [policy])),
        **compiled_in,
        num_warps=variant.num_warps,
    )


def table_rows(results: dict[str, Result]) -> list[list[str]]:
    """Rows of every timed size: the kernel's own choice, the best other one, torch's, the bound."""
    rows = []
    for name, result in results.items():
        if "ms" in result:
            times = dict(result["ms"])
            own, torch_s = times.pop(str(VARIANTS[0]), None), times.pop(next(reversed(times)))
            other = min(times, key=times.__getitem__, default=None)
            rows.append(
                [
                    name.removeprefix("kernel, "),
                    None if own is None else f"{own:.4f}",
                    None if other is None else f"{times[other]:.4f} ({other})",
                    f"{torch_s:.4f}",
                    f"{result['bound_ms']:.4f}",
                    None if own is None else f"{result['bound_ms'] / own:.0%}",
                ]
            )
    return rows
