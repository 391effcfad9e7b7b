"""ONNX Runtime as a Runner: the bundle's graphs on the CPU or a CUDA GPU, every cache written in
place.

An output bound to the very OrtValue of its input makes ScatterND write one row instead of copying
the cache (ONNX Runtime skips its copy when both are one buffer); `tests/runtime/test_speed.py`
holds on to it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ssd_export.bundle import Bundle
from ssd_export.bundle.graphs import FUSED, IMAGE_DECODER, INT8_DECODER, INT8_DECODER_TENSORS
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.graph_spec import NUM_SORTED_CODES, CacheTensor, GraphSpec, TensorSpec
from ssd_export.machine import multiplies_int8_exactly, num_cpus, total_bytes
from ssd_export.noise import GumbelNoise
from ssd_export.plan.memory import widens_on_use
from ssd_export.plan.sizes import WeightSizes
from ssd_export.policy.schedule import eviction_kinds, full_before
from ssd_export.runtime.finite import to_pixels
from ssd_export.runtime.grid_row_noise import GridRowNoise
from ssd_export.runtime.huge_pages import zeros_together
from ssd_export.runtime.ort_errors import check_contract, computing
from ssd_export.runtime.ort_operators import find_operators, has_fused_step, noise_maker
from ssd_export.runtime.ort_session import PROVIDERS, open_session, session_entries
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner, WindowNoise
from ssd_export.runtime.small_models import chosen_threads, is_small

EVICT = "evict"  # what these graphs sort is too short for a second thread
NO_WINDOW = (
    "this bundle was exported without the graph that lookahead needs; export it again with --force,"
    " or use --lookahead off"
)
NO_ROWS = (
    "this bundle was exported without the graph that decodes grid rows in parallel; export it again"
    " with --force, or use --lookahead off"
)
INEXACT_INT8 = (
    "images are decoded in float: this processor multiplies int8 without the instructions that keep"
    " every bit (AVX-512 VNNI, AVX-VNNI, ARM)"
)
log = logging.getLogger(__name__)
WITH_WEIGHTS = (
    "prefill",
    "decode_step",
    "decode_window",
    "decode_rows",
)  # graphs that hold those of the language model


class OrtRunner(Runner):
    """Caches live in OrtValues on the provider's device; a batch of another size allocates them
    anew.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        num_threads: int | None = None,
        exact: bool = False,
        profile: Path | None = None,
        widen_on_use: bool | None = None,
        uses_operators: bool | None = None,
    ) -> None:
        """Opens the sessions. profile: the beginning of the names of profiles, one of each graph,
        complete after end_profiling. widen_on_use: how float16 weights meet the CPU
        (runtime/widen_on_use.py); None decides by this machine's memory. uses_operators: those of
        ort_operators.py, where they are there; None: unless it has to be exact.
        """
        if provider not in PROVIDERS:
            raise UserError(f"unknown provider {provider!r}; use one of {', '.join(PROVIDERS)}")
        if bundle.config.dtype == "bfloat16" and provider == "cpu":
            raise UserError(
                "ONNX Runtime has no bfloat16 on the CPU; use --provider cuda, --runner torch, or"
                " export with --dtype fp32"
            )
        self._bundle, self._provider = bundle, provider
        self._table = bundle.config.policy
        self._specs = bundle.config.graphs
        self._config = bundle.config.model
        self.on_gpu = provider != "cpu"
        self.no_window = "" if "decode_window" in self._specs else NO_WINDOW
        self.no_rows = "" if "decode_rows" in self._specs else NO_ROWS
        self.num_threads = chosen_threads(self._config, num_threads)
        self.decodes_beside_steps = not self.on_gpu and num_threads != 1 and num_cpus() > 1
        self.opens_again = provider == "cpu" and not is_small(self._config)
        self._session_entries = session_entries(bundle.config.precision.main_format, exact)
        self.widens_on_use = provider == "cpu" and (
            chooses_to_widen_on_use(bundle) if widen_on_use is None else widen_on_use
        )
        self._decoder = INT8_DECODER if self._can_decode_in_int8(exact) else IMAGE_DECODER
        self._profile = profile
        uses_operators = not exact if uses_operators is None else uses_operators
        self._operators = find_operators() if uses_operators and not self.on_gpu else None
        self.fuses_steps = self._operators is not None and has_fused_step(bundle)
        self.make_noise = noise_maker(self._operators) if self._operators else GumbelNoise
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._opening = threading.Lock()  # images may be decoded beside the steps
        self._session(
            "prefill"
        )  # a provider that cannot start says so now, before anything is allocated
        self._values: dict[str, ort.OrtValue] = {}
        self._dimensions: dict[str, int] = {}
        self._bindings: dict[str, ort.IOBinding] = {}
        self._windows: dict[str, dict[str, ort.OrtValue]] = {}  # what depends on a window's width
        self._evictions: dict[int, list[str]] = {}

    @property
    def decodes_in_int8(self) -> bool:
        """Whether images are decoded by the int8 decoder of the bundle."""
        return self._decoder == INT8_DECODER

    @property
    def decodes_by_operators(self) -> bool:
        """Whether images are decoded by a graph that uses the operators (ort_operators.py)."""
        return self._operators is not None and self._fused(self._decoder) in self._bundle.files

    def _can_decode_in_int8(self, exact: bool) -> bool:
        """Whether the int8 decoder is there and serves; a processor that it does not is named."""
        if INT8_DECODER not in self._specs or self.on_gpu or exact:
            return False
        if not multiplies_int8_exactly():
            log.warning(INEXACT_INT8)
            return False
        return True

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        provider: str = "cpu",
        num_threads: int | None = None,
        exact: bool = False,
    ) -> OrtRunner:
        """Opens a runner on a bundle.

        Args: exact: quantized weights are multiplied out, as torch does (ort_session.py).
        """
        return cls(bundle, provider, num_threads, exact)

    def prefill(self, batch: PromptBatch) -> None:
        """Fills fresh caches from the prompts and generates token 0."""
        self._allocate(batch)
        self._noise = GridRowNoise(batch.images, self._config, batch.is_greedy, self.make_noise)
        suffix = "_top_k" if batch.uses_top_k else ""
        name = f"prefill{suffix}"
        self._leave_only(name)
        feeds = {
            "inputs_embeds": batch.embeds,
            "prompt_length": batch.lengths,
            "noise": self._noise.reach(0),
            **batch.sampling_inputs(),
        }
        wanted = [tensor.name for tensor in self._specs[name].inputs]
        if batch.uses_top_k:
            feeds[NUM_SORTED_CODES] = np.array(
                [min(max(one.top_k for one in batch.sampling), self._config.codebook_size)]
            )
            wanted.append(NUM_SORTED_CODES)
        outputs = [tensor.name for tensor in self._specs[name].outputs]
        session = self._session(name)
        with computing(name):
            values = session.run(outputs, {n: feeds[n] for n in wanted})
        results = dict(zip(outputs, values, strict=True))
        for given in wanted[1:]:
            self._values[given].update_inplace(feeds[given])
        tokens = np.zeros((self._table.grid.num_tokens, batch.num_images), np.int32)
        tokens[0] = results["token"]
        self._values["tokens"].update_inplace(tokens)
        self._values["logits"].update_inplace(results["logits"])
        self._last_logits = self._values["logits"]
        self._fill_caches(results, batch.lengths)
        self._evictions = self._evictions_of(batch.lengths.tolist())
        self._lengths, self._suffix = batch.lengths, suffix

    def evict(self, step: int) -> None:
        """Runs the evict graphs that are due before a step; a fused step evicts by itself."""
        if not self.fuses_steps:
            self._evict(step)

    def _evict(self, step: int) -> None:
        for name in self._evictions.get(step, ()):
            self._run(name, step)
            spec = self._specs[name]
            for cache, tensor in spec.cache_outputs.items():
                if tensor.name not in spec.aliases:
                    self._values[cache.past].update_inplace(self._values[cache.present].numpy())

    def decode_step(self, step: int) -> None:
        """Generates token `step` from token `step - 1`."""
        noise = self._noise.reach(step)
        if noise is not None:
            self._values["noise"].update_inplace(noise)
        name = f"decode_step{self._suffix}"
        self._leave_only(name)
        self._run(name, step)

    def decode_window(
        self, first: np.ndarray, limit: np.ndarray, inputs: np.ndarray, noise: WindowNoise
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples several tokens of every image in one pass (runner.py)."""
        name = f"decode_window{self._suffix}"
        self._leave_only(name)
        self._evict_images(first, limit > 0)
        feeds = {"window_tokens": inputs, "first": first, "limit": limit, "noise": noise()}
        values = self._run_window(name, feeds)
        sampled, kept = values["sampled"].numpy(), values["kept"].numpy()
        tokens = self._values["tokens"].numpy().copy()
        for image, (start, count) in enumerate(zip(first.tolist(), kept.tolist(), strict=True)):
            tokens[start : start + count, image] = sampled[image, :count]
        self._values["tokens"].update_inplace(tokens)
        self._last_logits = values["logits"]
        return sampled.copy(), kept.copy()

    def decode_rows(
        self, steps: np.ndarray, inputs: np.ndarray, noise: np.ndarray, num_new: int
    ) -> np.ndarray:
        """Samples the tokens of steps in several grid rows in one pass (runner.py)."""
        name = f"decode_rows{self._suffix}"
        self._leave_only(name)
        feeds = {"window_tokens": inputs, "steps": steps, "noise": noise}
        values = self._run_window(name, feeds)
        sampled, tokens = values["sampled"].numpy(), self._values["tokens"].numpy().copy()
        tokens[steps[:num_new]] = sampled[:, :num_new].T
        self._values["tokens"].update_inplace(tokens)
        self._last_logits = values["logits"]
        return sampled.copy()

    def tokens(self) -> np.ndarray:
        """int32 [N, image tokens]; what is not generated yet is 0."""
        return (
            self._values["tokens"].numpy().T.copy()
        )  # numpy() is a view of the device's memory on the CPU

    def logits(self) -> np.ndarray:
        """float32 [rows, V] of the newest token, before guidance."""
        logits = self._last_logits.numpy()
        return (logits[:, 0] if logits.ndim == 3 else logits).copy()

    def read_cache(self, tensor: CacheTensor) -> np.ndarray:
        """A copy of a cache tensor."""
        return self._values[tensor.past].numpy().copy()

    def write_cache(self, tensor: CacheTensor, values: np.ndarray) -> None:
        """Overwrites a cache tensor."""
        self._values[tensor.past].update_inplace(np.ascontiguousarray(values))

    def force_tokens(self, step: int, tokens: np.ndarray) -> None:
        """Makes int32 [N] the tokens of a step."""
        every = self._values["tokens"].numpy().copy()
        every[step] = tokens
        self._values["tokens"].update_inplace(every)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, height, width, 3] of tokens int32 [N, image tokens]."""
        session = self._session(self._decoder)
        with computing(self._decoder):
            (pixels,) = session.run(["pixels"], {"codes": np.ascontiguousarray(tokens, np.int32)})
        return to_pixels(pixels, self._bundle.config.dtype)

    def cache_bytes(self) -> int:
        """Bytes of the caches, as allocated."""
        return sum(
            math.prod(self._values[cache.past].shape()) * DTYPES[tensor.dtype].num_bytes
            for cache, tensor in self._specs["decode_step"].cache_inputs.items()
            if cache.past in self._values
        )

    def end_profiling(self) -> dict[str, Path]:
        """The profile of each graph that has run, by its name; nothing is recorded afterwards."""
        return {name: Path(session.end_profiling()) for name, session in self._sessions.items()}

    def close(self) -> None:
        """Closes all sessions and frees the caches."""
        self._sessions, self._values, self._bindings, self._dimensions = {}, {}, {}, {}
        self._windows = {}

    def _leave_only(self, name: str) -> None:
        """Closes the sessions whose turn is over where weights are large: each holds its own
        copy of them.
        """
        if not self.opens_again or self._profile is not None:
            return
        with self._opening:
            held = list(self._sessions)
        for other in [one for one in held if one.startswith(WITH_WEIGHTS) and one != name]:
            del self._sessions[other]
            for key in [key for key in self._bindings if key.split()[0] == other]:
                del self._bindings[key]

    def _session(self, name: str) -> ort.InferenceSession:
        with self._opening:
            if name not in self._sessions:
                self._sessions[name] = self._open(name)
            return self._sessions[name]

    def _open(self, name: str) -> ort.InferenceSession:
        files, fused = self._bundle.files, self._fused(name)
        operators = self._operators if fused in files else None
        tensors = f"onnx/{INT8_DECODER_TENSORS}"  # an earlier export has them in the graph
        beside = [tensors] if name == INT8_DECODER and tensors in files else []
        beside.append(self._bundle.config.text_embeddings.file)
        with self._bundle.using(fused if operators else f"onnx/{name}.onnx", *beside) as path:
            session = open_session(
                path,
                self._provider,
                1 if name.startswith(EVICT) else self.num_threads,
                self._session_entries,
                self._profile,
                self.widens_on_use and name not in (IMAGE_DECODER, INT8_DECODER),
                operators,
            )
            check_contract(session, self._specs[name], str(path))
        return session

    @staticmethod
    def _fused(name: str) -> str:
        return f"onnx/{name}{FUSED}.onnx"

    def _evictions_of(self, lengths: Sequence[int]) -> dict[int, list[str]]:
        """The graphs that evict before each step: those of the full groups alone, where the
        bundle has them.
        """
        evictions: dict[int, list[str]] = {}
        for kind in eviction_kinds(self._table):
            name = kind.graph if kind.graph in self._specs else "evict"
            for step in full_before(self._table, kind, lengths):
                names = evictions.setdefault(step, [])
                names += [name] * (name not in names)
        return evictions

    def _allocate(self, batch: PromptBatch) -> None:
        """Values of every input and output of the steps at this batch size, an aliased output being
        its input.
        """
        dimensions = {"images": batch.num_images, "rows": len(batch.lengths)}
        if dimensions == self._dimensions:
            return
        self._dimensions, self._bindings, self._windows = dimensions, {}, {}
        spec = self._specs["decode_step_top_k"]
        tensors = [*spec.inputs, *_not_aliased(spec), TensorSpec(NUM_SORTED_CODES, "int64", (1,))]
        if "evict" in self._specs:
            tensors += _not_aliased(self._specs["evict"])
        caches = {} if self.on_gpu else self._cache_values()
        self._values = caches | {
            tensor.name: self._new_value(tensor) for tensor in tensors if tensor.name not in caches
        }

    def _cache_values(self) -> dict[str, ort.OrtValue]:
        """Values of the caches in the processor's own memory."""
        tensors = list(self._specs["decode_step"].cache_inputs.values())
        shapes = [(t.sizes(self._dimensions), DTYPES[t.dtype].numpy) for t in tensors]
        return {
            tensor.name: ort.OrtValue.ortvalue_from_numpy(array)
            for tensor, array in zip(tensors, zeros_together(shapes), strict=True)
        }

    def _run_window(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        """Runs a graph of several places and returns what it has for itself at this width: all else
        it shares with the steps.
        """
        width, spec = feeds["window_tokens"].shape[1], self._specs[name]
        key, dimensions = f"{name} of {width}", self._dimensions | {"window": width}
        if key not in self._windows:
            own = [t for t in (*spec.inputs, *_not_aliased(spec)) if t.name not in self._values]
            own += [t for t in (*spec.inputs, *spec.outputs) if t.name in ("noise", "logits")]
            self._windows[key] = {t.name: self._new_value(t, dimensions) for t in own}
        values = self._windows[key]
        for given, array in feeds.items():
            values[given].update_inplace(np.ascontiguousarray(array))
        self._run_bound(name, values, key)
        return values

    def _evict_images(self, first: np.ndarray, active: np.ndarray) -> None:
        """Evicts what is due before each image's own step."""
        if len(first) == 1:
            return self._evict(int(first[0]))
        for step in sorted(set(first[active].tolist()) & self._evictions.keys()):
            images = np.flatnonzero(active & (first == step))
            rows = np.concatenate(
                [images + place * len(first) for place in range(self._config.rows_per_image)]
            )
            for name in self._evictions[step]:
                self._evict_rows(name, step, rows)
        return None

    def _evict_rows(self, name: str, step: int, rows: np.ndarray) -> None:
        """Runs an evict graph on some rows alone: others, at other steps, may be full as well."""
        spec, feeds = self._specs[name], {"step": np.array([step], np.int64)}
        for tensor in spec.inputs:
            if tensor.name != "step":
                feeds[tensor.name] = self._values[tensor.name].numpy()[rows]
        session, outputs = self._session(name), [tensor.name for tensor in spec.outputs]
        with computing(name):
            results = session.run(outputs, feeds)
        for cache, values in zip(spec.cache_outputs, results, strict=True):
            every = self._values[cache.past].numpy().copy()
            every[rows] = values
            self._values[cache.past].update_inplace(every)

    def _new_value(
        self, tensor: TensorSpec, dimensions: dict[str, int] | None = None
    ) -> ort.OrtValue:
        shape = tensor.sizes(dimensions or self._dimensions)
        return ort.OrtValue.ortvalue_from_shape_and_type(
            shape, DTYPES[tensor.dtype].onnx, self._provider, 0
        )

    def _fill_caches(self, results: dict[str, np.ndarray], lengths: np.ndarray) -> None:
        """Prompt token t to slot t, everything else empty and zero (R8; 0 x NaN would be NaN)."""
        for cache, tensor in self._specs["decode_step"].cache_inputs.items():
            shape = tensor.sizes(self._dimensions)
            if cache.kind == "position":
                slot = np.arange(shape[2], dtype=np.int32)
                filled = np.where(slot < lengths[:, None, None], slot, np.int32(-1))
                filled = np.ascontiguousarray(np.broadcast_to(filled, shape))
            else:
                prompt = results[cache.present]
                filled = np.zeros(shape, prompt.dtype)
                held = np.arange(prompt.shape[2]) < lengths[:, None, None]
                filled[:, :, : prompt.shape[2]] = np.where(
                    held.reshape(*held.shape, *[1] * (prompt.ndim - 3)), prompt, 0
                )
            self._values[tensor.name].update_inplace(filled)

    def _run(self, name: str, step: int) -> None:
        self._values["step"].update_inplace(np.array([step], np.int64))
        self._last_logits = self._values["logits"]
        self._run_bound(name, {}, name)

    def _run_bound(self, name: str, values: dict[str, ort.OrtValue], key: str) -> None:
        """Runs a graph on these values beside those of every graph. key: of their binding, made
        once.
        """
        if key not in self._bindings:
            self._bindings[key] = self._bind(name, self._values | values)
        with computing(name):
            self._session(name).run_with_iobinding(self._bindings[key])

    def _bind(self, name: str, values: dict[str, ort.OrtValue]) -> ort.IOBinding:
        spec, binding = self._specs[name], self._session(name).io_binding()
        names = [tensor.name for tensor in spec.inputs]
        for input_name in names + [NUM_SORTED_CODES] * ("top_k" in names):
            binding.bind_ortvalue_input(input_name, values[input_name])
        for tensor in spec.outputs:
            binding.bind_ortvalue_output(
                tensor.name, values[spec.aliases.get(tensor.name, tensor.name)]
            )
        return binding


def _not_aliased(spec: GraphSpec) -> list[TensorSpec]:
    return [tensor for tensor in spec.outputs if tensor.name not in spec.aliases]


def chooses_to_widen_on_use(bundle: Bundle) -> bool:
    """Whether float16 weights, widened once and for all, would be too much for this machine."""
    dtype = bundle.config.dtype
    return dtype == "float16" and widens_on_use(WeightSizes.of_bundle(bundle), dtype, total_bytes())
