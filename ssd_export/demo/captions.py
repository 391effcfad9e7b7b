"""Parses a caption from its words alone, so that the checker never trusts the scene generator.

The language, with the words of `scenes`:

    caption  = (object | number kinds | object "and" object | object relation object) "on" ground
    object   = ("a" | "an" before orange) color kind
    number   = ("two" | "three" | "four") color
    relation = "left of" | "right of" | "above" | "below"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ssd_export.demo.scenes import COLORS, GROUNDS, KINDS, NUMBERS, RELATIONS, plural
from ssd_export.errors import UserError, short

_KIND_OF = {plural(kind): kind for kind in KINDS}
_COUNT_OF = {word: count for count, word in NUMBERS.items()}


@dataclass(frozen=True)
class Expectation:
    """The ground, the (color, kind) of every object, and where the first stands seen from the
    second.
    """

    ground: str
    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def count(self) -> int:
        """Number of objects asked for."""
        return len(self.objects)


def parse_caption(text: str) -> Expectation:
    """Parses a caption into the objects it asks for.

    Args:
        text: a caption of the language above; space around it does not count.
    Raises:
        UserError: the caption is outside the language.
    """
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise UserError(f"cannot read the caption {short(text)}; {_help()}")
    part = match.groupdict()
    if part["number"]:
        alike = (part["color"], _KIND_OF[part["kinds"]])
        return Expectation(part["ground"], (alike,) * _COUNT_OF[part["number"]])
    objects = tuple(_object(part[name]) for name in ("first", "second") if part[name])
    return Expectation(part["ground"], objects, part["relation"])


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


def _object_pattern() -> str:
    """An object with the article that its color takes."""
    plain = [color for color in COLORS if color[0] not in "aeiou"]
    vowel = [color for color in COLORS if color[0] in "aeiou"]
    return f"(?:a (?:{_any_of(plain)})|an (?:{_any_of(vowel)})) (?:{_any_of(KINDS)})"


_CAPTION = re.compile(
    rf"(?:(?P<number>{_any_of(_COUNT_OF)}) (?P<color>{_any_of(COLORS)})"
    rf" (?P<kinds>{_any_of(_KIND_OF)})"
    rf"|(?P<first>{_object_pattern()})"
    rf"(?: (?:and|(?P<relation>{_any_of(RELATIONS)})) (?P<second>{_object_pattern()}))?)"
    rf" on (?P<ground>{_any_of(GROUNDS)})"
)


def _object(words: str) -> tuple[str, str]:
    _, color, kind = words.split(" ")
    return color, kind


def _help() -> str:
    return (
        'write "a red circle on white", "three red circles on white", "a red circle and a blue bar'
        ' on white" '
        f'or "a red circle above a blue bar on white"; colors: {", ".join(COLORS)}; '
        f"shapes: {', '.join(KINDS)}; grounds: {', '.join(GROUNDS)}; "
        f"numbers: {', '.join(_COUNT_OF)}; relations: {', '.join(RELATIONS)}"
    )
