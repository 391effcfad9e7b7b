"""transformers' own Janus with its own growing cache, timed token by token: the baseline of the
literature.

Imports transformers (the extra `bench`), as model/text_encoder.py does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ssd_export.bench.spec import NO_TRANSFORMERS
from ssd_export.errors import UserError
from ssd_export.model.families import janus
from ssd_export.model.prompt import TemplateEncoder
from ssd_export.sampling import Sampling

if TYPE_CHECKING:
    from ssd_export.bench.cell import Cell, StepProgress

MAX_PROMPT = 64  # the cache grows with the prompt, so any bound that it fits does


class _EnoughError(Exception):
    """Ends `generate` when as many tokens as wanted are timed."""


def measure_transformers(cell: Cell, progress: StepProgress) -> dict[str, Any]:
    """The same figures as of a bundle, for `generate` with greedy sampling and guidance.

    Raises: UserError without transformers, or for a checkpoint that it cannot read.
    """
    from ssd_export.bench.cell import (
        StepTimes,
        image_figures,
        peak_resident_bytes,
        step_figures,
    )

    began = time.perf_counter()
    model, inputs = _open(cell)
    facts: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
    times = _token_times(model, inputs, cell, progress)
    facts["first_token_ms"] = 1000 * times[0][0]
    seconds, cpu_seconds = (
        [late - early for early, late in zip(clock, clock[1:])] for clock in zip(*times)
    )
    facts |= step_figures(StepTimes(seconds, cpu_seconds), cell.batch)
    facts["peak_resident_bytes"] = peak_resident_bytes()
    tokens = torch.zeros(1, janus.GRID.num_tokens, dtype=torch.long, device=cell.provider)
    with torch.inference_mode():
        return facts | image_figures(
            lambda: model.decode_image_tokens(tokens), facts, cell, janus.GRID.num_tokens
        )


def open_images(cell: Cell) -> Callable[[int], object]:
    """Generates one batch of whole images; the seed is of no use to greedy sampling.

    Raises: UserError as measure_transformers.
    """
    model, inputs = _open(cell)

    def generate(seed: int) -> object:
        with torch.inference_mode():
            return model.decode_image_tokens(_generate(model, inputs))

    return generate


def _generate(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens [N, image tokens] of greedy sampling with guidance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            **inputs,
            generation_mode="image",
            do_sample=False,
            guidance_scale=Sampling().cfg_scale,
        )


def _open(cell: Cell) -> tuple[Any, dict[str, torch.Tensor]]:
    try:
        from transformers import JanusForConditionalGeneration
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(NO_TRANSFORMERS) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(cell.threads)
    assert cell.path is not None
    dtype = torch.float16 if cell.provider == "cuda" else torch.float32
    try:
        model = (
            JanusForConditionalGeneration.from_pretrained(cell.path, dtype=dtype)
            .eval()
            .to(cell.provider)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"transformers cannot read {cell.path} ({reason}); give --model a checkpoint in the"
            " layout of deepseek-community/Janus-Pro-1B, or use --baselines full"
        ) from error
    encoder = TemplateEncoder.from_file(
        cell.path / janus.TOKENIZER, janus.PROMPT, janus.TITLE, model.config.text_config.vocab_size
    )
    model.generation_config.update(
        bos_token_id=encoder.begin_id, eos_token_id=encoder.pad_id, pad_token_id=encoder.pad_id
    )
    model.generation_config.generation_kwargs = {"boi_token_id": encoder.end_id}
    ids = (
        torch.from_numpy(
            encoder.encode([janus.EXAMPLES[0]] * cell.batch, MAX_PROMPT).ids[: cell.batch]
        )
        .long()
        .to(cell.provider)
    )
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _token_times(
    model: Any, inputs: dict[str, torch.Tensor], cell: Cell, progress: StepProgress
) -> list[tuple[float, float]]:
    """Seconds after the start, passed and computed, at which each of the first steps + 1 tokens had
    its logits.
    """

    times: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        if cell.provider == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began, time.process_time()))
        if len(times) % janus.GRID.width == 1:
            progress(len(times) - 1, cell.steps)
        if len(times) > cell.steps:
            raise _EnoughError

    hook = model.model.generation_head.register_forward_hook(note)
    began = time.perf_counter()
    try:
        _generate(model, inputs)
    except _EnoughError:
        pass
    finally:
        hook.remove()
    progress(cell.steps, cell.steps)
    return times
