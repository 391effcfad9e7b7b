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
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule, pinned_bits
from ssd_export.verify.tolerances import TOLERANCES

KERNEL_CHECK = [sys.executable, "-m", "benchmarks.kernel_check"]
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_PLACES = (
    Path("/usr/local/cuda/bin/compute-sanitizer"),
    Path("/usr/local/cuda/compute-sanitizer/compute-sanitizer"),
)
IMAGE_CASE = KernelCase("by the driver", HeadGroup(GUARDED, 180, 24, 4), head_dim=128)
IMAGE_STEPS = 30  # the cache of 180 slots is full at the eighth
HEADS, HEAD_DIM = 16, 128  # Janus-Pro-1B's
BATCHES, SLOTS = (1, 8, 32, 128), (64, 180, 320, 640)
COLD_BYTES = 256 << 20  # of caches that launches take in turn: more than any GPU's second level


@dataclass(frozen=True)
class Variant:
    """A choice of how the kernel is compiled or launched. block_slots at HEAD_DIM; num_splits: None
    is the kernel of a head group, a number those of a layer with so many programs a head.
    """

    block_slots: int
    num_stages: int
    num_warps: int
    num_splits: int | None = None

    def __str__(self) -> str:
        if self.num_splits is not None:
            return f"a layer, {self.num_splits} part(s)"
        return f"{self.block_slots} slots, {self.num_stages} stages, {self.num_warps} warps"


VARIANTS = (
    Variant(16, 5, 4),  # the kernel's own
    Variant(32, 3, 4),
    Variant(32, 1, 4),
    Variant(16, 5, 8),
    Variant(32, 3, 8),
    *(Variant(16, 5, 4, num_splits) for num_splits in (1, 2, 4, 8)),  # as layers are compiled
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
    """The kernel compiled ahead of time for this GPU, launched through the driver: each step once
    as it is and once captured, from the same state; both against the reference.

    Args: device: a CudaDevice; None opens the GPU.
    """
    from ssd_export.kernels.compile import compile_kernels
    from ssd_export.tensorrt.cuda_device import CudaDevice, open_driver

    with tempfile.TemporaryDirectory() as folder:
        (image,) = compile_kernels(Path(folder), (capability,), (dtype,), (case.head_dim,))
        code = (Path(folder) / image.cubin).read_bytes()
        arguments = json.loads((Path(folder) / "kernels.json").read_text())["arguments"]
    opened = device or CudaDevice(open_driver())
    errors = []
    try:
        kernel = opened.load_kernel(code, image.kernel_name)
        for step, (state, token, lengths) in enumerate(steps_of(case, dtype)):
            wanted = state.copied(torch.float32)
            out = reference.decode_attention(
                *(part.float() for part in token),
                wanted,
                GroupPolicy(case.group, case.score_decay, GRID.width),
                lengths,
                lengths + step,
            )
            for captured in (False, True):
                launch = _Launch(opened, kernel, image, arguments, captured)
                ours = launch(case, state, token, lengths, step)
                errors.append(_difference(ours, out, wanted))
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
            GroupPolicy(group, case.score_decay, GRID.width),
            lengths,
            lengths + step,
        )


class _Launch:
    """One launch through the driver, its memory filled before and read after."""

    def __init__(
        self, device: Any, kernel: Any, image: Any, arguments: list, captured: bool
    ) -> None:
        self._device, self._kernel, self._image = device, kernel, image
        self._arguments, self._captured = arguments, captured

    def __call__(
        self, case: KernelCase, state: GroupState, token: list[Tensor], lengths: Tensor, step: int
    ) -> tuple[Tensor, GroupState]:
        out, logits = torch.empty_like(token[0]), torch.zeros(state.position.shape)
        tensors = {
            "query_ptr": token[0],
            "key_ptr": token[1],
            "value_ptr": token[2],
            "position_ptr": lengths + step,
            "prompt_length_ptr": lengths,
            "cache_key_ptr": state.key,
            "cache_value_ptr": state.value,
            "cache_position_ptr": state.position,
            "cache_score_ptr": state.score,
            "logits_ptr": logits,
            "out_ptr": out,
        }
        places = {name: self._upload(tensor) for name, tensor in tensors.items()}
        self._queue(places | scalars_of(case))
        left = {name: self._download(places[name], tensors[name]) for name in tensors}
        for address in places.values():
            self._device.free(address)
        caches = (left[f"cache_{part}_ptr"] for part in ("key", "value", "position", "score"))
        return left["out_ptr"], GroupState(*caches)

    def _queue(self, values: dict[str, int | float]) -> None:
        kinds = [_ctype(argument["type"]) for argument in self._arguments]
        given = tuple(values.get(argument["name"], 0) for argument in self._arguments)
        programs = int(values["num_programs"])

        def launch() -> None:
            self._device.launch_kernel(
                self._kernel,
                (programs, 1),
                32 * self._image.num_warps,
                given,
                tuple(kinds),
                self._image.shared_bytes,
            )

        if self._captured:
            graph = self._device.capture(launch)
            self._device.launch(graph)
            self._device.destroy(graph)
        else:
            launch()

    def _upload(self, tensor: Tensor) -> int:
        array = bits_of(tensor)
        address = self._device.allocate(array.nbytes)
        self._device.upload(address, array)
        return address

    def _download(self, address: int, like: Tensor) -> Tensor:
        array = bits_of(like)
        read = self._device.download(address, array.shape, array.dtype)
        return torch.from_numpy(read).view(like.dtype)


def scalars_of(case: KernelCase, rows: int = 4) -> dict[str, int | float]:
    """The kernel's numbers for a case, and how many programs there are."""
    group, rule = case.group, case.group.rule
    width = group.num_heads * case.head_dim
    return {
        "query_stride": width * case.query_group_size,
        "key_stride": width,
        "value_stride": width,
        "num_heads": group.num_heads,
        "query_group_size": case.query_group_size,
        "num_slots": group.num_slots,
        "num_sinks": rule.num_sinks,
        "num_recent": rule.num_recent,
        "by_score": int(rule.by_score),
        "pinned_columns": pinned_bits(rule.pinned_columns),
        "grid_width": GRID.width,
        "age_quota": int(rule.age_quota),
        "evict_every": group.evict_every,
        "score_decay": case.score_decay,
        "num_programs": rows * group.num_heads,
    }


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
    """One step of the cache by a variant: a launch of the kernel with other constants, or the
    launches of a layer of one group.
    """
    from ssd_export.kernels import decode_attention as kernel
    from ssd_export.kernels.layer_attention import decode_layer

    query, key, value = token
    if variant.num_splits is not None:
        policy, position = GroupPolicy(group, 1.0, GRID.width), lengths + group.num_slots
        decode_layer(query, key, value, [state], [policy], lengths, position, variant.num_splits)
        return
    rows, num_heads, head_dim = key.shape
    constants = kernel.constants(head_dim, group.num_slots, query.element_size())
    constants |= {"BLOCK_SLOTS": variant.block_slots, "NUM_STAGES": variant.num_stages}
    numbers = scalars_of(KernelCase("", group, head_dim), rows)
    position = lengths + group.num_slots
    logits = torch.empty(state.position.shape, device=query.device)
    kernel.decode_attention_kernel[(rows * num_heads,)](
        query,
        key,
        value,
        position,
        lengths,
        state.key,
        state.value,
        state.position,
        state.score,
        logits,
        torch.empty_like(query),
        *(numbers[name] for name in kernel.SCALARS),
        **constants,
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
