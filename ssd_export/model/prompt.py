"""Prompts -> token ids by a family's template, exactly as its models were trained to see them;
needs only numpy and tokenizers.

Control tokens are found by name: a name has different ids in different checkpoints.
What a user types is text, never control.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.errors import UserError, first_line, short
from ssd_export.model.tokenizer_file import read_tokenizer

Prompt = str | np.ndarray  # what a user typed, or float32 [tokens, width] of a text encoder


@dataclass(frozen=True)
class EncodedPrompts:
    """Rows of N prompts: the N conditional ones first, then, with guidance, the N unconditional
    ones.

    ids: int32 [rows, T] of the table of condition embeddings, T the longest prompt; shorter rows
    are padded on the right.
    prompt_length: int32 [rows], the ids of a row that count.
    given: float32 [N, T, width], in place of what the table has for the conditional rows.
    """

    ids: np.ndarray
    prompt_length: np.ndarray
    given: np.ndarray | None = None

    def embeds(self, lookup: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float32 [rows, T, width]. Args: lookup: float32 [..., width] of ids [...]."""
        if self.given is None:
            return lookup(self.ids)
        return np.concatenate([self.given, lookup(self.ids[len(self.given) :])])


@dataclass(frozen=True)
class PromptTemplate:
    """The rows of a prompt.

    Conditional row:    begin, parts, end
    Unconditional row:  begin, as many pads as the parts have tokens, end
    (those pads are attended; what pads a short row to the length of the batch is not).
    parts: text, in which {prompt} is what the user typed, and roles, which are control tokens where
    the tokenizer has them as such.
    """

    begin: str
    end: str
    pad: str
    roles: tuple[str, ...]
    parts: tuple[str, ...]


class TemplateEncoder:
    """Prompts to ids by a template, with the tokenizer of a checkpoint."""

    def __init__(
        self, spec: dict[str, Any], template: PromptTemplate, title: str = "matching"
    ) -> None:
        """Parses the tokenizer.

        Args: spec: the content of tokenizer.json; title: of the family, for messages.
        """
        self._template = template
        added = {token["content"]: token for token in spec["added_tokens"]}
        # Some added tokens are letters that the vocabulary lacks: text. Those named <...> are
        # control, whether or not the file calls them special.
        self._control = {
            name: token for name, token in added.items() if token["special"] or _is_bracketed(name)
        }
        tokens = [
            {**token, "special": token["content"] in self._control}
            for token in spec["added_tokens"]
        ]
        from tokenizers import Tokenizer  # here: who brings ids of tokens needs no tokenizer

        self._text = Tokenizer.from_str(json.dumps({**spec, "added_tokens": tokens}))
        self._text.encode_special_tokens = True  # control tokens in the text are spelled out
        self._text.no_truncation()
        self._text.no_padding()
        needed = (template.begin, template.pad, template.end)
        missing = [name for name in needed if name not in self._control]
        if missing:
            raise UserError(
                f"tokenizer.json lacks the added token {missing[0]}: give a {title} tokenizer"
            )
        self.begin_id, self.pad_id, self.end_id = map(self._id, needed)
        self._control_ids = frozenset(map(self._id, self._control))
        self.max_id = max(self._text.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_file(
        cls, path: str | Path, template: PromptTemplate, title: str, vocab_size: int
    ) -> TemplateEncoder:
        """The encoder of a tokenizer.json.

        Args: vocab_size: rows of the model's table of text embeddings.
        Raises: UserError when the file is missing, damaged, another family's tokenizer, or has ids
        beyond the table.
        """
        spec = read_tokenizer(Path(path))
        try:
            encoder = cls(spec, template, title)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except BaseException as error:  # the library raises bare Exception for every fault, and a
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # BaseException where Rust panics
            raise UserError(
                f"{path} is not a tokenizer.json ({first_line(error)}): download it again"
            ) from None
        if encoder.max_id >= vocab_size:
            raise UserError(
                f"{path} has ids up to {encoder.max_id}, the model has {vocab_size} embeddings:"
                " take tokenizer.json from the same checkpoint"
            )
        return encoder

    def encode(
        self, prompts: Sequence[Prompt], prompt_slots: int, negative_prompts: Sequence[str] = ()
    ) -> EncodedPrompts:
        """The rows of a batch.

        Args:
            prompts: one for each image; white space around them is dropped.
            prompt_slots: cache slots for a prompt, the longest that fits, control tokens included.
            negative_prompts: none, or one for each image; its conditional row then stands for the
                unconditional one. "" leaves the template's.
        Raises: UserError for no prompt, an empty one, one that is too long or is not valid Unicode.
        """
        if not prompts:
            raise UserError("no prompt: say what to generate")
        rows = [self._row(prompt, "prompt", prompt_slots) for prompt in prompts]
        rows += [
            self._row(negative, "negative prompt", prompt_slots)
            if negative.strip()
            else [self.begin_id] + [self.pad_id] * (len(row) - 2) + [self.end_id]
            for row, negative in zip(rows, negative_prompts or [""] * len(rows), strict=True)
        ]
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        ids = np.full((len(rows), lengths.max()), self.pad_id, dtype=np.int32)
        for padded, row in zip(ids, rows):
            padded[: len(row)] = row
        return EncodedPrompts(ids, lengths)

    def _row(self, prompt: Prompt, name: str, prompt_slots: int) -> list[int]:
        """The conditional row of a prompt. Args: name: for messages."""
        if not isinstance(prompt, str):
            raise UserError("this model encodes its prompts itself: give text, not embeddings")
        text = prompt.strip()
        if not text:
            raise UserError(f"the {name} is empty: say what to generate")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"the {name} {short(prompt)} is not valid Unicode: type it in UTF-8"
            ) from None
        row = [self.begin_id, *self._template_ids(text, name), self.end_id]
        if len(row) > prompt_slots:
            raise UserError(
                f"the {name} {short(prompt)} is {len(row)} tokens long, {prompt_slots} fit:"
                f" shorten it by {len(row) - prompt_slots} tokens or export with --prompt-slots"
                f" {len(row)}"
            )
        return row

    def _template_ids(self, text: str, name: str) -> list[int]:
        """Text between two control tokens is encoded in one piece: a word merges with the space
        before it.
        """
        ids: list[int] = []
        template = self._template
        pending, strip_left = "", self._control[template.begin]["rstrip"]
        for part in template.parts:
            if not (part in template.roles and part in self._control):
                pending += part.replace("{prompt}", text)
                continue
            strip_right = self._control[part]["lstrip"]
            ids += self._text_ids(pending, name, strip_left, strip_right) + [self._id(part)]
            pending, strip_left = "", self._control[part]["rstrip"]
        strip_right = self._control[template.end]["lstrip"]
        return ids + self._text_ids(pending, name, strip_left, strip_right)

    def _text_ids(self, text: str, name: str, strip_left: bool, strip_right: bool) -> list[int]:
        text = text.lstrip() if strip_left else text
        text = text.rstrip() if strip_right else text
        ids = self._text.encode(text, add_special_tokens=False).ids if text else []
        if not self._control_ids.isdisjoint(ids):
            token = next(self._text.id_to_token(i) for i in ids if i in self._control_ids)
            raise UserError(
                f"the {name} spells the control token {token}: remove it, or put spaces in between"
            )
        return ids

    def _id(self, name: str) -> int:
        found = self._text.token_to_id(name)
        if found is None:
            raise UserError(f"tokenizer.json lists the token {name} and has no id for it")
        return int(found)


def _is_bracketed(name: str) -> bool:
    return len(name) > 2 and name.startswith("<") and name.endswith(">")


def text_of(prompt: Prompt) -> str:
    """A prompt as text: what was typed, or how many tokens were embedded elsewhere."""
    return prompt if isinstance(prompt, str) else f"embeddings of {len(prompt)} tokens"
