"""Prompts embedded by the T5 encoder that text-conditional LlamaGen was trained on (Flan-T5 XL);
needs transformers (the extra `embed`).

Each prompt goes through the encoder by itself, without padding, so its rows do not depend on what
is embedded beside it. Source of the cleaning: language/t5.py of LlamaGen, whose training had the
captions cleaned; its rules for web pages (addresses, HTML, file names) are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_export.errors import UserError, first_line, short
from ssd_export.model.config_file import ConfigFile, shown
from ssd_export.model.tokenizer_file import read_tokenizer
from ssd_export.model.weight_files import read_json

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
KIND = "t5"  # model_type of config.json, Flan-T5's too
WAY_OUT = "give the folder of the model's own encoder (for the published ones google/flan-t5-xl)"
TYPOGRAPHIC = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―〜〰", "-"),
        **dict.fromkeys("`´«»“”¨", '"'),
        **dict.fromkeys("‘’", "'"),
    }
)
SYMBOLS = re.compile(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What a model reads: width of its embeddings, and the most tokens of a prompt."""

    width: int
    num_tokens: int


def clean_prompt(text: str) -> str:
    """A prompt as the captions of the training were: lower case, plain quotes and dashes, no
    symbols.
    """
    text = SYMBOLS.sub(" ", text.lower().translate(TYPOGRAPHIC))
    text = re.sub(r"\.{2,}|\s+\.\s+", " ", text)
    text = re.sub(r"(\D[,.])(?=\w)", r"\1 ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"^['_,\-:;]|['_,\-:+]$", "", text).strip()


class TextEncoder:
    """The encoder of a folder, checked against what a model reads."""

    def __init__(self, folder: Path, wanted: Wanted, dtype: str, device: str) -> None:
        """Args: dtype: torch's name; device: cpu or cuda.

        Raises: UserError for a folder of another encoder, of another width, without its tokenizer,
        or whose weights cannot be read, and for a device that is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; use cpu")
        self._wanted, self._device = wanted, device
        file = ConfigFile(folder / CONFIG, read_json(folder / CONFIG))
        _check_kind(file, wanted)
        self._eos, self._vocab_size = _id(file, "eos_token_id"), file.count("vocab_size", 32_128)
        self._tokenizer = _tokenizer(folder / TOKENIZER)
        self._model = _load(folder, getattr(torch, dtype)).to(device)

    def ids(self, text: str) -> list[int]:
        """Ids of a prompt's tokens. Raises: UserError for one that is empty or too long, or for
        another model's tokenizer.
        """
        ids: list[int] = self._tokenizer.encode(text).ids
        if not text or ids == [self._eos]:
            raise UserError("a prompt is empty once it is cleaned: say what to generate")
        if ids[-1] != self._eos or max(ids) >= self._vocab_size:
            raise UserError(
                f"{TOKENIZER} is not of this encoder (ids {ids[:4]} ... {ids[-1]}): take it from"
                " the encoder's own repository"
            )
        if len(ids) > self._wanted.num_tokens:
            raise UserError(
                f"the prompt {short(text)} is {len(ids)} tokens long, {self._wanted.num_tokens}"
                f" fit: shorten it by {len(ids) - self._wanted.num_tokens} tokens"
            )
        return ids

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [tokens, width] of a prompt. Raises: UserError where they are not finite."""
        row = torch.tensor([ids], device=self._device)
        rows = self._model(input_ids=row).last_hidden_state[0].float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise UserError("the encoder gives NaN or infinity: use --dtype fp32")
        return rows

    def embed_all(
        self, texts: Sequence[str], progress: Progress = lambda stage, done, total: None
    ) -> dict[str, np.ndarray]:
        """prompt_embeds float32 [N, num_tokens, width], zero on the left of each prompt, and
        attention_mask int64 [N, num_tokens].

        Raises: UserError as ids and embed, before anything is embedded where ids can tell.
        """
        rows = [self.ids(text) for text in texts]
        shape = len(rows), self._wanted.num_tokens
        embeds = np.zeros((*shape, self._wanted.width), np.float32)
        mask = np.zeros(shape, np.int64)
        for done, ids in enumerate(rows):
            embeds[done, -len(ids) :] = self.embed(ids)
            mask[done, -len(ids) :] = 1
            progress("embedding prompts", done + 1, len(rows))
        return {"prompt_embeds": embeds, "attention_mask": mask}


def _check_kind(file: ConfigFile, wanted: Wanted) -> None:
    kind = file.values.get("model_type")
    if kind != KIND:
        raise UserError(f"{file.path}: model_type is {shown(kind)}, not {KIND}: {WAY_OUT}")
    width = file.count("d_model", 512)
    if width != wanted.width:
        raise UserError(
            f"{file.path}: the encoder's embeddings are {width} wide (d_model), and the model reads"
            f" {wanted.width}: {WAY_OUT}"
        )


def _id(file: ConfigFile, name: str) -> int:
    value = file.values.get(name, 1)
    if type(value) is not int or value < 0:
        raise file.wrong(name, value, "a token's id")
    return value


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    spec = read_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:  # the library raises bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{path} is not a tokenizer.json ({first_line(error)}): download it again"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """The encoder half of a T5 in a folder, its weights from safetensors alone."""
    from safetensors import SafetensorError
    from transformers import T5EncoderModel

    loaded: Any
    with _quiet():
        try:
            loaded = T5EncoderModel.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{folder} cannot be read as a T5 encoder ({first_line(error)}): download its"
                " config.json and *.safetensors again"
            ) from None
    model, said = loaded
    lacks = sorted(said["missing_keys"])
    if lacks:
        raise UserError(f"{folder} lacks the encoder's tensor {lacks[0]}: download it again")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages of the library: of a whole T5 it lists the decoder's tensors as unused."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
