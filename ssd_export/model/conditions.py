"""Conditions that are not text: a class of the model's list, or embeddings that a text encoder made
before; needs only numpy.

Rows as of any prompt: N conditional ones, then N unconditional ones of the same lengths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssd_export.errors import UserError, short
from ssd_export.model.prompt import EncodedPrompts, Prompt

NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class ClassEncoder:
    """A class's row of the table and, with guidance, the row after the last class.

    names: of classes, in lower case, where the checkpoint gives them.
    """

    num_classes: int
    has_guidance: bool
    names: Mapping[str, int]

    def encode(
        self, prompts: Sequence[Prompt], prompt_slots: int, negative_prompts: Sequence[str] = ()
    ) -> EncodedPrompts:
        """A row of one id for each prompt: the number of a class, or its name.

        Args: negative_prompts: none, or a class for each prompt, "" for no class.
        Raises: UserError for no prompt, and for one that names no class.
        """
        if not prompts:
            raise UserError(f"no class: {self._way_out()}")
        rows = [self._number(prompt) for prompt in prompts]
        if self.has_guidance:
            negative = negative_prompts or [""] * len(prompts)
            rows += [self._number(text) if text.strip() else self.num_classes for text in negative]
        return EncodedPrompts(np.array(rows, np.int32)[:, None], np.ones(len(rows), np.int32))

    def _number(self, prompt: Prompt) -> int:
        if not isinstance(prompt, str):
            raise UserError(f"this model generates classes, not embeddings: {self._way_out()}")
        text = prompt.strip()
        known = self.names.get(text.lower())
        if known is not None:
            return known
        if not NUMBER.fullmatch(text):
            raise UserError(f"{short(text)} is no class of this model: {self._way_out()}")
        if int(text) >= self.num_classes:
            raise UserError(f"class {text} is beyond the model's last: {self._way_out()}")
        return int(text)

    def _way_out(self) -> str:
        numbers = f"give a number in 0 .. {self.num_classes - 1}, such as --class 0"
        return f"{numbers}, or a name such as {next(iter(self.names))!r}" if self.names else numbers


@dataclass(frozen=True)
class CaptionEncoder:
    """Embeddings of a caption's tokens and, with them, as many rows from the end of the learned
    null caption: both stand at the right end of num_tokens places, and what is left of them is not
    attended.
    """

    num_tokens: int
    caption_dim: int

    def encode(
        self, prompts: Sequence[Prompt], prompt_slots: int, negative_prompts: Sequence[str] = ()
    ) -> EncodedPrompts:
        """Rows of a batch.

        Args: prompts: float32 [T, caption_dim] of each image, the caption's tokens alone.
        Raises: UserError for text, another width, no token, too many, numbers that are not finite,
        or a negative prompt.
        """
        if not prompts:
            raise UserError(f"no prompt: {self._way_out()}")
        if any(text.strip() for text in negative_prompts):
            raise UserError("this model has no text encoder for a negative prompt: leave it out")
        given = [self._checked(prompt, prompt_slots) for prompt in prompts]
        lengths = np.array([len(rows) for rows in given] * 2, np.int32)
        longest = int(lengths.max())
        embeds = np.zeros((len(given), longest, self.caption_dim), np.float32)
        ids = np.full((len(lengths), longest), self.num_tokens - 1, np.int32)
        for row, rows in enumerate(given):
            embeds[row, : len(rows)] = rows
        for held, length in zip(ids, lengths.tolist(), strict=True):
            held[:length] = np.arange(self.num_tokens - length, self.num_tokens)
        return EncodedPrompts(ids, lengths, embeds)

    def _checked(self, prompt: Prompt, prompt_slots: int) -> np.ndarray:
        if isinstance(prompt, str):
            raise UserError(
                f"this model reads captions as embeddings, not as text ({short(prompt)}):"
                f" {self._way_out()}"
            )
        if prompt.ndim != 2 or prompt.shape[1] != self.caption_dim:
            raise UserError(
                f"prompt embeddings of shape {list(prompt.shape)}, and this model takes [tokens,"
                f" {self.caption_dim}]: embed the prompts with the model's own text encoder"
            )
        most = min(prompt_slots, self.num_tokens)
        if not 1 <= len(prompt) <= most:
            more = f" or export with --prompt-slots {len(prompt)}"
            raise UserError(
                f"prompt embeddings of {len(prompt)} tokens, and 1 to {most} fit: shorten the"
                f" prompt{more if most < len(prompt) <= self.num_tokens else ''}"
            )
        if not np.isfinite(prompt).all():
            raise UserError("prompt embeddings hold NaN or infinity: embed the prompts again")
        return prompt

    def _way_out(self) -> str:
        return (
            "give --prompt-embeds FILE.safetensors with what its text encoder (Flan-T5 XL for the"
            " published ones) makes of the prompts"
        )
