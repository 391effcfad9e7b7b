"""torch as a Runner: the reference, on the CPU or a CUDA GPU, from the same weights file as the
graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssd_export.bundle import Bundle
from ssd_export.cache.attention import decode_attention, fill_from_prompt, prefill_attention
from ssd_export.cache.state import GroupState
from ssd_export.cache.window_attention import AttendedWindow, attend_window, write_window
from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.permuted_heads import PermutedHeads
from ssd_export.model.quantization import dequantize
from ssd_export.model.torch_threads import set_torch_threads
from ssd_export.model.uninitialized import Uninitialized
from ssd_export.policy.layout import group_slices, query_slices
from ssd_export.policy.table import HeadGroup, PolicyTable
from ssd_export.runtime.finite import to_pixels
from ssd_export.runtime.grid_row_noise import GridRowNoise
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner
from ssd_export.runtime.small_models import chosen_threads

NO_INT8_WINDOW = (
    "the torch runner writes int8 keys and values one token a pass; use --runner ort, or"
    " --lookahead off"
)
# Has the arguments of cache.attention.decode_attention.
StepAttention = Callable[..., Tensor]


class TorchRunner(Runner):
    """Evictions happen inside the step (R7), so `evict` has nothing to do."""

    def __init__(
        self,
        model: ImageTokenModel | PermutedHeads,
        image_decoder: ImageDecoder | None,
        table: PolicyTable,
        device: str = "cpu",
        attention: StepAttention | None = None,
    ) -> None:
        """Takes over a model in eager torch.

        Args: model: its heads in the table's order; image_decoder: None where no pixels are wanted;
        attention: of a decode step. None: the reference on the CPU, the Triton kernel on a GPU.
        Raises: UserError for a kernel that is missing, or that has not this cache's dtype.
        """
        self._model, self._image_decoder, self._table = model, image_decoder, table
        self._config, self._device = model.config, device
        self._dtype = next(model.parameters()).dtype
        self._attention = attention or step_attention(device, table)
        self.no_window = "" if table.kv_dtype == "model" else NO_INT8_WINDOW
        self.num_threads = torch.get_num_threads()
        self._states: list[list[GroupState]] = []

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
        model, image_decoder = load_modules(bundle, bundle.config.model, provider)
        attention = decode_attention if exact else None
        return cls(model, image_decoder, bundle.config.policy, provider, attention)

    @torch.inference_mode()
    def prefill(self, batch: PromptBatch) -> None:
        """Fills fresh caches from the prompts and generates token 0."""
        embeds = torch.from_numpy(batch.embeds).to(self._device, self._dtype)
        self._lengths = torch.from_numpy(batch.lengths).to(self._device)
        self._noise_rows = GridRowNoise(batch.images, self._config, batch.is_greedy)
        self._sampling = {
            name: torch.from_numpy(values).to(self._device)
            for name, values in batch.sampling_inputs().items()
        }
        rows, num_tokens = embeds.shape[:2]
        self._states = [
            [
                GroupState.empty(
                    rows,
                    group,
                    self._config.head_dim,
                    self._dtype,
                    self._device,
                    self._table.kv_dtype,
                )
                for group in groups
            ]
            for groups in self._table.layers
        ]
        self._tokens = torch.zeros(
            self._config.grid.num_tokens,
            batch.num_images,
            dtype=torch.int32,
            device=self._device,
        )
        positions = torch.arange(num_tokens, device=self._device).expand(rows, -1)
        hidden = self._model.condition(embeds)
        hidden = self._model(hidden, positions, self._attend_prompt, self._lengths)
        last = hidden[torch.arange(rows, device=self._device), self._lengths.long() - 1]
        self._draw(last, 0)

    def evict(self, step: int) -> None:
        """Does nothing: `decode_attention` evicts where R7 says so."""

    @torch.inference_mode()
    def decode_step(self, step: int) -> None:
        """Generates token `step` from token `step - 1`."""
        hidden = self._model.embed_image_tokens(self._tokens[step - 1].long())
        self._position = self._lengths + (step - 1)
        hidden = self._model(
            hidden.repeat(self._config.rows_per_image, 1)[:, None],
            self._position[:, None],
            self._attend_cache,
            self._lengths,
        )
        self._draw(hidden[:, 0], step)

    @torch.inference_mode()
    def decode_window(
        self, first: np.ndarray, limit: np.ndarray, inputs: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples several tokens of every image in one pass (runner.py)."""
        rows = self._config.rows_per_image
        steps, limits, drafts, of_places = (
            torch.from_numpy(array).to(self._device) for array in (first, limit, inputs, noise)
        )
        active = limits > 0
        position = self._lengths + (steps - 1).repeat(rows)
        pass_ = _WindowPass(self, position, active.repeat(rows))
        hidden = self._model.embed_image_tokens(drafts.long()).repeat(rows, 1, 1)
        places = torch.arange(inputs.shape[1], device=self._device)
        hidden = self._model(hidden, position[:, None] + places, pass_.attend, self._lengths)
        logits = self._model.image_logits(hidden).float()  # [B, W, V]
        drawn = torch.stack(
            [
                draw_tokens(
                    logits[:, place],
                    of_places[:, place],
                    **self._sampling,
                )
                for place in range(inputs.shape[1])
            ],
            dim=1,
        )
        right = (drafts[:, 1:] == drawn[:, :-1]).long().cumprod(dim=1).sum(dim=1) + 1
        counts = torch.minimum(right, limits)
        pass_.write(counts.repeat(rows))
        for image, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
            self._tokens[start : start + count, image] = drawn[image, :count]
        self._logits = logits[:, 0]
        return drawn.cpu().numpy(), counts.cpu().numpy()

    def tokens(self) -> np.ndarray:
        """int32 [N, image tokens]; what is not generated yet is 0. Waits for the device."""
        return self._tokens.T.contiguous().cpu().numpy()

    def logits(self) -> np.ndarray:
        """float32 [rows, V] of the newest token, before guidance."""
        return self._logits.cpu().numpy()

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
        self._tokens[step] = torch.from_numpy(tokens).to(self._device)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels uint8 [n, height, width, 3] of codes int32 [n, image tokens]."""
        if self._image_decoder is None:
            raise ValueError("this runner was made without an image decoder")
        return decode_pixels(self._image_decoder, tokens, self._device)

    def _cache(self, tensor: CacheTensor) -> Tensor:
        return getattr(self._states[tensor.layer][tensor.group], tensor.kind)

    def cache_bytes(self) -> int:
        """Bytes of the caches, as allocated."""
        return sum(state.num_bytes for layer in self._states for state in layer)

    def close(self) -> None:
        """Frees the caches."""
        self._states = []

    def _groups(self, layer: int) -> list[tuple[HeadGroup, GroupState, slice, slice]]:
        groups = self._table.layers[layer]
        return list(
            zip(
                groups,
                self._states[layer],
                group_slices(groups),
                query_slices(groups, self._config.query_group_size),
                strict=True,
            )
        )

    def _attend_prompt(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, scores = prefill_attention(query, key, value, self._lengths)
        for _, state, heads, _ in self._groups(layer):
            fill_from_prompt(state, key[:, heads], value[:, heads], scores[:, heads], self._lengths)
        return out

    def _attend_cache(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        for group, state, heads, queries in self._groups(layer):
            out[:, queries, 0] = self._attention(
                query[:, queries, 0],
                key[:, heads, 0],
                value[:, heads, 0],
                state,
                self._table.of_group(group),
                self._lengths,
                self._position,
            )
        return out

    def _draw(self, hidden: Tensor, step: int) -> None:
        self._logits = self._model.image_logits(hidden).float()
        noise = self._noise_rows.reach(step)
        if noise is not None:
            self._noise = torch.from_numpy(noise).to(self._device)
        self._tokens[step] = draw_tokens(
            self._logits, self._noise[step % self._config.grid.width], **self._sampling
        )


class _WindowPass:
    """The attention of one pass over a window: attended layer by layer, written at the end."""

    def __init__(self, runner: TorchRunner, position: Tensor, active: Tensor) -> None:
        self._runner, self._position, self._active = runner, position, active
        self._windows: list[AttendedWindow] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        runner, out = self._runner, torch.empty_like(query)
        for group, state, heads, queries in runner._groups(layer):
            out[:, queries], window = attend_window(
                query[:, queries],
                key[:, heads],
                value[:, heads],
                state,
                runner._table.of_group(group),
                runner._lengths,
                self._position,
                self._active,
            )
            self._windows.append(window)
        return out

    def write(self, counts: Tensor) -> None:
        for window in self._windows:
            write_window(window, self._position, counts)


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
        return decode_attention
    way_out = "use --provider cpu, or --runner ort --provider cuda"
    if table.kv_dtype != "model":
        raise UserError(
            f"the torch runner's kernel has no {table.kv_dtype} keys and values; {way_out}"
        )
    try:
        from ssd_export.kernels import decode_attention as kernel
    except ImportError as error:
        raise UserError(
            f"the torch runner needs Triton on a GPU ({error}): pip install"
            f' "ssd-export[kernels]", or {way_out}'
        ) from error
    return kernel.decode_attention


def load_modules(
    bundle: Bundle, config: ModelConfig, device: str
) -> tuple[ImageTokenModel, ImageDecoder]:
    """The torch modules with the bundle's weights: what the graphs multiply by [in, out] is [out,
    in] here.
    """
    with Uninitialized():
        model, decoder = ImageTokenModel(config), ImageDecoder(config)
    path = bundle.file("onnx/weights.safetensors")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for module in (model, decoder):
                matrices = _Matrices(file)
                names = module.state_dict()
                state = {name: _stored(file, matrices, name, config) for name in names}
                _check_dtypes(state, getattr(torch, bundle.config.dtype))
                module.load_state_dict(state, assign=True)
                module.eval().requires_grad_(False)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
        if "allocate" in str(error) or "out of memory" in str(error):
            raise UserError(
                f"not enough memory for the weights of {bundle.path} ({reason}); free some, or use"
                " --runner ort, which takes less for quantized weights"
            ) from error
        raise UserError(
            f"{path} does not hold the weights that ssd_config.json describes ({reason}); export"
            " the bundle again with --force, or copy it again from where it came"
        ) from error
    return model.to(device), decoder.to(device)


def _check_dtypes(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError for a tensor of another dtype, as in the weights of another bundle."""
    for name, tensor in state.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, not {dtype}")


class _Matrices:
    """Matrices [in, out] of a weights file; a quantized one is multiplied out once for all the
    modules that share it.
    """

    def __init__(self, file: safe_open) -> None:
        self._file, self._names = file, set(file.keys())
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        scale = f"{name}.scale"
        if scale not in self._names:
            return self._file.get_tensor(name)
        if self._last is None or self._last[0] != name:
            self._last = name, dequantize(self._file.get_tensor(name), self._file.get_tensor(scale))
        return self._last[1]


def _stored(file: safe_open, matrices: _Matrices, name: str, config: ModelConfig) -> Tensor:
    """A tensor of the modules, out of the weights file (export/weights.py has the other
    direction).
    """
    if name in file.keys():  # noqa: SIM118 - safe_open has no __contains__
        return file.get_tensor(name)
    stem = name.removesuffix(".weight")
    if stem in file.keys():  # noqa: SIM118 - safe_open has no __contains__
        return matrices[stem].T
    prefix, layer, block, part = stem.removeprefix("language_model.").split(".")
    root = f"{prefix}.{layer}"
    if part in ("q_proj", "k_proj", "v_proj"):
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return matrices[f"{root}.qkv"].T.split([query, kv, kv])["qkv".index(part[0])]
    if part in ("gate_proj", "up_proj"):
        return matrices[f"{root}.gate_up"].T.chunk(2)[part == "up_proj"]
    return matrices[f"{root}.{part.removesuffix('_proj')}"].T


def draw_tokens(
    logits: Tensor, noise: Tensor, cfg_scale: Tensor, temperature: Tensor, top_k: Tensor
) -> Tensor:
    """int32 [N], drawn as export/sampler.py tells.

    Args: logits float32 [2 N, V], or [N, V] without guidance; noise float32 [N, V]; cfg_scale,
    temperature float32 [N]; top_k int64 [N], 0 for every code.
    """
    guided = logits
    if len(logits) > len(noise):
        conditional, unconditional = logits.chunk(2)
        guided = unconditional + cfg_scale[:, None] * (conditional - unconditional)
    race = guided + temperature[:, None] * noise
    if top_k.any():
        wanted = top_k.clamp(max=guided.shape[1])[:, None]
        sorted_logits = guided.topk(int(wanted.max())).values
        threshold = sorted_logits.gather(1, (wanted - 1).clamp(min=0))
        race = race.masked_fill((guided < threshold) & (wanted > 0), -torch.inf)
    return race.argmax(dim=-1).int()
