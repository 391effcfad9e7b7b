"""torch as a Runner: the reference, on the CPU or a CUDA GPU, from the same weights file as the
graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssd_export.bundle import Bundle
from ssd_export.cache.attention import decode_layer, fill_from_prompt, prefill_attention
from ssd_export.cache.state import GroupState
from ssd_export.cache.window_attention import attend_layer_window, attend_rows
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.permuted_heads import PermutedHeads
from ssd_export.model.torch_threads import set_torch_threads
from ssd_export.policy.layout import group_slices, query_slices
from ssd_export.policy.table import GroupPolicy, HeadGroup, PolicyTable
from ssd_export.runtime.captured_step import CapturedStep, Step, cuda_graph
from ssd_export.runtime.finite import to_pixels
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner, WindowNoise
from ssd_export.runtime.small_models import chosen_threads
from ssd_export.runtime.torch_batch import BatchSize, TorchBatch, fill_on_gpu

NO_INT8_WINDOW = (
    "the torch runner writes int8 keys and values one token a pass; use --runner ort, or"
    " --lookahead off"
)


class StepAttention(Protocol):
    """What cache.attention.decode_layer takes and returns."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        states: Sequence[GroupState],
        policies: Sequence[GroupPolicy],
        prompt_length: Tensor,
        position: Tensor,
    ) -> Tensor:
        """Attends a layer's new tokens over the caches of its groups; changes the states."""


class WindowAttention(Protocol):
    """What cache.window_attention.attend_layer_window takes and returns."""

    def __call__(
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
        """Attends a layer's window; what it returns writes the tokens that count."""


class TorchRunner(Runner):
    """Evictions happen inside the step (R7), so `evict` has nothing to do."""

    window_writes = 0.6  # measured on the demo: its tokens are written into their slots one by one

    def __init__(
        self,
        model: ImageTokenModel | PermutedHeads,
        image_decoder: ImageDecoder | None,
        table: PolicyTable,
        device: str = "cpu",
        attention: StepAttention | None = None,
        capture: Callable[[Step], Step] | None = None,
        window: WindowAttention | None = None,
    ) -> None:
        """Takes over a model in eager torch.

        Args: model: its heads in the table's order; image_decoder: None where no pixels are wanted;
        attention: of a decode step. None: the reference on the CPU, the Triton kernel on a GPU;
        capture: makes one launch of a step. None: a CUDA graph with the kernel; nothing with the
        reference, which asks the host in every layer; window: attention of a pass over several
        tokens. None: the kernel where `attention` is one by itself, else the reference.
        Raises: UserError for a kernel that is missing, or that has not this cache's dtype.
        """
        self._model, self._image_decoder, self._table = model, image_decoder, table
        self._config, self._device = model.config, device
        self._dtype = next(model.parameters()).dtype
        self._attention = attention or step_attention(device, table)
        self._attend_window = window or window_attention(device if attention is None else "cpu")
        on_gpu = torch.device(device).type == "cuda"
        self._capture = capture or (cuda_graph if on_gpu and attention is None else None)
        self._fill_noise = fill_on_gpu if on_gpu and attention is None else None
        self.queues_steps = self._capture is not None
        self.on_gpu = torch.device(device).type != "cpu"
        self.no_window = "" if table.kv_dtype == "model" else NO_INT8_WINDOW
        self.no_rows = self.no_window
        self.num_threads = torch.get_num_threads()
        self._allocated: TorchBatch | None = None
        self._take_step: Step = self._step

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        provider: str = "cpu",
        num_threads: int | None = None,
        exact: bool = False,
    ) -> TorchRunner:
        """Opens a runner on a bundle.

        Args: provider: cpu or cuda; num_threads: None takes one for a small model, else every core
        that this process may use; exact: the reference's attention on a GPU, too.
        Raises: UserError for an unknown provider, or no CUDA GPU.
        """
        if provider not in ("cpu", "cuda"):
            raise UserError(f"unknown provider {provider!r}; use one of cpu, cuda")
        if provider == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "torch finds no CUDA GPU; use --provider cpu, or install torch for CUDA"
            )
        set_torch_threads(chosen_threads(bundle.config.model, num_threads) or None)
        from ssd_export.runtime.torch_weights import load_modules

        model, image_decoder = load_modules(bundle, bundle.config.model, provider)
        attention = decode_layer if exact else None
        return cls(model, image_decoder, bundle.config.policy, provider, attention)

    @torch.inference_mode()
    def prefill(self, batch: PromptBatch) -> None:
        """Fills fresh caches from the prompts and generates token 0."""
        ready = self._allocate(BatchSize.of(batch, self._config))
        ready.start(batch)
        first, place = batch.different_rows()
        embeds = torch.from_numpy(batch.embeds[first]).to(self._device, self._dtype)
        lengths = torch.from_numpy(batch.lengths[first]).to(self._device)
        rows, num_tokens = embeds.shape[:2]
        positions = torch.arange(num_tokens, device=self._device).expand(rows, -1)
        prompt = _PromptPass(self, lengths, torch.from_numpy(place).to(self._device))
        hidden = self._model.condition(embeds)
        hidden = self._model(hidden, positions, prompt.attend, lengths)
        last = hidden[torch.arange(rows, device=self._device), lengths.long() - 1]
        self._draw(last[prompt.place])
        ready.passed()

    def evict(self, step: int) -> None:
        """Does nothing: `decode_layer` evicts where R7 says so."""

    @torch.inference_mode()
    def decode_step(self, step: int) -> None:
        """Generates token `step` from token `step - 1`; with a capture, returns before it is."""
        self._ready.go_to(step)
        self._take_step()
        self._ready.passed()

    def _step(self) -> None:
        """One step on the device alone: nothing here depends on the host or goes back to it."""
        ready = self._ready
        before = ready.step - 1
        hidden = self._model.embed_image_tokens(ready.tokens.index_select(0, before)[0].long())
        self._position = ready.lengths + before
        hidden = self._model(
            hidden.repeat(self._config.rows_per_image, 1)[:, None],
            self._position[:, None],
            self._attend_cache,
            ready.lengths,
        )
        self._draw(hidden[:, 0])

    @torch.inference_mode()
    def decode_window(
        self, first: np.ndarray, limit: np.ndarray, inputs: np.ndarray, noise: WindowNoise
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples several tokens of every image in one pass (runner.py). On a GPU its operators are
        queued one by one, not captured: its shapes change from pass to pass.
        """
        rows, ready = self._config.rows_per_image, self._ready
        steps, limits, drafts, of_places = (
            torch.from_numpy(array).to(self._device) for array in (first, limit, inputs, noise())
        )
        active = limits > 0
        position = ready.lengths + (steps - 1).repeat(rows)
        pass_ = _WindowPass(self, position, active.repeat(rows))
        hidden = self._model.embed_image_tokens(drafts.long()).repeat(rows, 1, 1)
        places = torch.arange(inputs.shape[1], device=self._device)
        hidden = self._model(hidden, position[:, None] + places, pass_.attend, ready.lengths)
        logits, drawn = self._draw_places(hidden, of_places)
        right = (drafts[:, 1:] == drawn[:, :-1]).long().cumprod(dim=1).sum(dim=1) + 1
        counts = torch.minimum(right, limits)
        pass_.write(counts.repeat(rows))
        for image, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
            ready.tokens[start : start + count, image] = drawn[image, :count]
        ready.logits.copy_(logits[:, 0])
        return drawn.cpu().numpy(), counts.cpu().numpy()

    @torch.inference_mode()
    def decode_rows(
        self, steps: np.ndarray, inputs: np.ndarray, noise: np.ndarray, num_new: int
    ) -> np.ndarray:
        """Samples the tokens of steps in several grid rows in one pass (runner.py)."""
        rows, ready = self._config.rows_per_image, self._ready
        of_steps, tokens, of_places = (
            torch.from_numpy(array).to(self._device) for array in (steps, inputs, noise)
        )
        position = ready.lengths[:, None].long() + of_steps - 1  # [B, W]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = torch.empty_like(query)
            for _, state, heads, queries in self._groups(layer):
                token = query[:, queries], key[:, heads], value[:, heads]
                out[:, queries] = attend_rows(*token, state, position)
            return out

        hidden = self._model.embed_image_tokens(tokens.long()).repeat(rows, 1, 1)
        hidden = self._model(hidden, position, attend, ready.lengths)
        logits, drawn = self._draw_places(hidden, of_places)
        ready.tokens[of_steps[:num_new]] = drawn[:, :num_new].T.to(ready.tokens.dtype)
        ready.logits.copy_(logits[:, 0])
        return drawn.cpu().numpy().astype(np.int32)

    def _draw_places(self, hidden: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, W, V] of hidden [B, W, hidden], and what is drawn, [N, W]; noise
        float32 [N, W, V].
        """
        ready, logits = self._ready, self._model.image_logits(hidden).float()
        drawn = [
            draw_tokens(
                logits[:, place],
                noise[:, place],
                **ready.sampling,
                sorted_codes=ready.size.sorted_codes,
            )
            for place in range(noise.shape[1])
        ]
        return logits, torch.stack(drawn, dim=1)

    def tokens(self) -> np.ndarray:
        """int32 [N, image tokens]; what is not generated yet is 0. Waits for the device."""
        return self._ready.tokens.T.cpu().numpy().copy()  # the next batch writes over them

    def logits(self) -> np.ndarray:
        """float32 [rows, V] of the newest token, before guidance."""
        return self._ready.logits.cpu().numpy().copy()

    def read_cache(self, tensor: CacheTensor) -> np.ndarray:
        """A copy of a cache tensor; bfloat16 as float32."""
        values = self._cache(tensor)
        return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy().copy()

    @torch.inference_mode()
    def write_cache(self, tensor: CacheTensor, values: np.ndarray) -> None:
        """Overwrites a cache tensor."""
        self._cache(tensor).copy_(torch.from_numpy(np.ascontiguousarray(values)))

    @torch.inference_mode()
    def force_tokens(self, step: int, tokens: np.ndarray) -> None:
        """Makes int32 [N] the tokens of a step."""
        self._ready.tokens[step] = torch.from_numpy(tokens).to(self._device)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels uint8 [n, height, width, 3] of codes int32 [n, image tokens]."""
        if self._image_decoder is None:
            raise ValueError("this runner was made without an image decoder")
        return decode_pixels(self._image_decoder, tokens, self._device)

    def _cache(self, tensor: CacheTensor) -> Tensor:
        return getattr(self._ready.states[tensor.layer][tensor.group], tensor.kind)

    def cache_bytes(self) -> int:
        """Bytes of the caches, as allocated."""
        return self._ready.num_bytes

    def close(self) -> None:
        """Frees the caches and the captured step."""
        self._allocated, self._take_step = None, self._step

    @property
    def _ready(self) -> TorchBatch:
        if self._allocated is None:
            raise RuntimeError("no batch is under way: prefill comes first")
        return self._allocated

    def _allocate(self, size: BatchSize) -> TorchBatch:
        """The tensors of a batch of this size, and the step over them; those of another size are
        freed first.
        """
        if self._allocated is None or self._allocated.size != size:
            self.close()
            self._allocated = TorchBatch(
                size, self._config, self._table, self._dtype, self._device, self._fill_noise
            )
            if self._capture is not None:
                self._take_step = CapturedStep(self._step, self._capture)
        return self._allocated

    def _groups(self, layer: int) -> list[tuple[HeadGroup, GroupState, slice, slice]]:
        groups = self._table.layers[layer]
        return list(
            zip(
                groups,
                self._ready.states[layer],
                group_slices(groups),
                query_slices(groups, self._config.query_group_size),
                strict=True,
            )
        )

    def _attend_cache(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = self._attention(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            self._ready.states[layer],
            [self._table.of_group(group) for group in self._table.layers[layer]],
            self._ready.lengths,
            self._position,
        )
        return out[:, :, None]

    def _draw(self, hidden: Tensor) -> None:
        """Samples the token of the step that the device is at, and counts the step."""
        ready = self._ready
        ready.logits.copy_(self._model.image_logits(hidden))
        noise = ready.noise.index_select(0, ready.step % self._config.grid.width)[0]
        drawn = draw_tokens(
            ready.logits, noise, **ready.sampling, sorted_codes=ready.size.sorted_codes
        )
        ready.tokens.index_copy_(0, ready.step, drawn[None])
        ready.step += 1


class _PromptPass:
    """The attention of the pass over the prompts, each computed once: a row of the batch takes the
    keys and values of the one that it is a copy of. place: int64 [B], of its prompt among those.
    """

    def __init__(self, runner: TorchRunner, lengths: Tensor, place: Tensor) -> None:
        self._runner, self._lengths, self.place = runner, lengths, place

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, scores = prefill_attention(query, key, value, self._lengths)
        for _, state, heads, _ in self._runner._groups(layer):
            keys, values, scored = (part[:, heads][self.place] for part in (key, value, scores))
            fill_from_prompt(state, keys, values, scored, self._runner._ready.lengths)
        return out


class _WindowPass:
    """The attention of one pass over a window: attended layer by layer, written at the end."""

    def __init__(self, runner: TorchRunner, position: Tensor, active: Tensor) -> None:
        self._runner, self._position, self._active = runner, position, active
        self._writes: list[Callable[[Tensor], None]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        runner = self._runner
        out, write = runner._attend_window(
            query,
            key,
            value,
            runner._ready.states[layer],
            [runner._table.of_group(group) for group in runner._table.layers[layer]],
            runner._ready.lengths,
            self._position,
            self._active,
        )
        self._writes.append(write)
        return out

    def write(self, counts: Tensor) -> None:
        for write in self._writes:
            write(counts)


@torch.inference_mode()
def decode_pixels(
    image_decoder: ImageDecoder, tokens: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """Pixels uint8 [n, height, width, 3] of codes int [n, image tokens]."""
    pixels = image_decoder(torch.from_numpy(np.asarray(tokens, np.int64)).to(device)).float()
    levels = ((pixels + 1) / 2 * 255).clamp(0, 255).permute(0, 2, 3, 1).cpu().numpy()
    return to_pixels(levels, str(next(image_decoder.parameters()).dtype).removeprefix("torch."))


def step_attention(device: str, table: PolicyTable) -> StepAttention:
    """The attention of a decode step: the reference on the CPU, the Triton kernel on a GPU.

    Raises: UserError where a GPU has no kernel for this cache; the reference, which waits for the
    device in every layer, never takes its place unasked.
    """
    if torch.device(device).type == "cpu":
        return decode_layer
    way_out = "use --provider cpu, or --runner ort --provider cuda"
    if table.kv_dtype != "model":
        raise UserError(
            f"the torch runner's kernel has no {table.kv_dtype} keys and values; {way_out}"
        )
    try:
        from ssd_export.kernels import layer_attention as kernel
    except ImportError as error:
        raise UserError(
            f"the torch runner needs Triton on a GPU ({error}): pip install"
            f' "ssd-export[kernels]", or {way_out}'
        ) from error
    return kernel.decode_layer


def window_attention(device: str) -> WindowAttention:
    """The attention of a pass over several tokens: the reference on the CPU, the Triton kernels on
    a GPU, where step_attention has found Triton.
    """
    if torch.device(device).type == "cpu":
        return attend_layer_window
    from ssd_export.kernels import window_attention as kernel

    return kernel.attend_layer_window


def draw_tokens(
    logits: Tensor,
    noise: Tensor,
    cfg_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    sorted_codes: int | None = None,
) -> Tensor:
    """int32 [N], drawn as export/sampler.py tells.

    Args: logits float32 [2 N, V], or [N, V] without guidance; noise float32 [N, V]; cfg_scale,
    temperature float32 [N]; top_k int64 [N], 0 for every code; sorted_codes: the greatest top_k;
    None asks the device.
    """
    guided = logits
    if len(logits) > len(noise):
        conditional, unconditional = logits.chunk(2)
        guided = unconditional + cfg_scale[:, None] * (conditional - unconditional)
    race = guided + temperature[:, None] * noise
    if sorted_codes is None:
        sorted_codes = min(int(top_k.max()), guided.shape[1])
    if sorted_codes:
        wanted = top_k.clamp(max=sorted_codes)[:, None]
        sorted_logits = guided.topk(sorted_codes).values
        threshold = sorted_logits.gather(1, (wanted - 1).clamp(min=0))
        race = race.masked_fill((guided < threshold) & (wanted > 0), -torch.inf)
    return race.argmax(dim=-1).int()
