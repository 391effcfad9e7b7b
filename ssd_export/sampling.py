"""Numbers by which a token is drawn from logits, and their checks.

The numbers go to the graphs as float32, so a number that float32 does not hold is refused here, not
rounded to infinity there.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from ssd_export.errors import UserError

MAX_TEMPERATURE = 1e30  # times the greatest noise, 16.7, it is finite in float32
# Guided logits of several thousand stay finite and precise in float32 up to here.
MAX_CFG_SCALE = 1e6
MAX_COUNT = 2**31 - 1  # of images or tokens: what an int32 index reaches
MAX_IMAGES = 100_000  # of one call, which holds the pixels of all of them until its end
ZIPAR = "zipar:"  # of lookahead: grid rows in parallel, which are not single steps' tokens
MAX_SEED = 2**64 - 1  # the key of the random numbers has 64 bits


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens. cfg_scale: guidance u + cfg_scale (c - u); temperature: of the softmax of
    the guided logits, 0 is greedy; top_k: draw among that many, 0 among all.

    Numbers of any kind are accepted (numpy's too) and kept as Python's.
    Raises: UserError for a number that cannot be sampled with.
    """

    cfg_scale: float = 5.0  # Janus-Pro's own
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        cfg_scale = as_float(self.cfg_scale, "cfg_scale", "use 5, or 1 for no guidance")
        if not 0 <= cfg_scale <= MAX_CFG_SCALE:
            raise UserError(
                f"cfg_scale {cfg_scale:g} is outside 0 .. {MAX_CFG_SCALE:g}; use 5, or 1 for no"
                " guidance"
            )
        temperature = as_float(self.temperature, "temperature", "use 1.0, or 0 for greedy")
        if not 0 <= temperature <= MAX_TEMPERATURE:
            raise UserError(
                f"temperature {temperature:g} is outside 0 .. {MAX_TEMPERATURE:g}; use 1.0, or 0"
                " for greedy"
            )
        object.__setattr__(self, "cfg_scale", cfg_scale)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_k", as_count(self.top_k, "top_k", 0, "use 0 for all tokens"))

    def changed(
        self,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
    ) -> Sampling:
        """Returns this sampling with the numbers that are given. Raises: UserError."""
        return Sampling(
            self.cfg_scale if cfg_scale is None else cfg_scale,
            self.temperature if temperature is None else temperature,
            self.top_k if top_k is None else top_k,
        )


def as_float(value: Any, name: str, way_out: str) -> float:
    """A real number as a float. Raises: UserError for anything else, and for NaN."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"{name} {_shown(value)} is not a number; {way_out}")
    return number


def as_count(
    value: Any, name: str, least: int = 1, way_out: str = "", most: int = MAX_COUNT
) -> int:
    """A whole number in least .. most as an int; numpy's integers are accepted.

    Raises: UserError for anything else.
    """
    advice = way_out or f"use {least} or more"
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} {_shown(value)} is not a whole number; {advice}") from None
    if isinstance(value, bool):
        raise UserError(f"{name} {value} is not a whole number; {advice}")
    if not least <= number <= most:
        where = f"below {least}" if number < least else f"above {most}"
        raise UserError(f"{name} {_shown(number)} is {where}; {advice}")
    return number


def as_seed(value: Any, name: str = "seed") -> int:
    """A seed as an int. Raises: UserError for what is no unsigned 64-bit number."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise UserError(
            f"{name} {_shown(value)} is not a whole number in 0 .. 2**64 - 1; use a number such"
            " as 0"
        )
    return number


def _shown(value: Any) -> str:
    """A value for a message, however long it is."""
    if isinstance(value, int) and abs(value) >= 10**39:  # Python refuses to print the longest ones
        return "of more than 39 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def rows_start(lookahead: int | str) -> int | None:
    """S of "zipar:S", None for another mode. Raises: UserError where S is no number from 1 on."""
    if not isinstance(lookahead, str) or not lookahead.startswith(ZIPAR):
        return None
    text = lookahead.removeprefix(ZIPAR)
    if not (text.isascii() and text.isdecimal() and len(text) <= 4 and int(text) >= 1):
        raise UserError(
            f"lookahead {lookahead[:40]!r} is not {ZIPAR}S with S tokens of a grid row, from 1 to"
            f" the grid's width; use {ZIPAR}12"
        )
    return int(text)
