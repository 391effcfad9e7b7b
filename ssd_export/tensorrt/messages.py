"""Collects and judges what TensorRT says while it parses and builds.

A warning that means "the engine does something else than the graph" fails the build. The parser
drops an input that it does not know of with no more than "Unused Input", and a builder may take
another precision than was asked for. Warnings that are known to mean nothing are dropped: inlined
functions repeat node names, and int64 inputs are meant. Everything else is handed on to the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from ssd_export.errors import UserError
from ssd_export.tensorrt.layer_listing import Layer, parse_listing

# By message, not by word: a harmless one may speak of overflow or of falling back, too.
FATAL = re.compile(
    r"^Unused Input: "
    r"|layernorm\S* nodes? in FP16|layernorm after self-attention in FP16"
    r"|had the following issues when converted to"  # weights that their new dtype does not hold
    r"|outside the range of INT(32|64) was clamped"
    r"|Attempting to cast down to INT32"
    r"|[Ff]alling back to (FP32|TF32|FP16|BF16)\b"
    r"|[Nn]o implementation of layer \S+ obeys the requested (precision )?constraints",
    re.MULTILINE,
)
HARMLESS = re.compile(
    r"already exists, the output tensors of this new instance|Make sure (input|output) \S+ has"
    r" Int64 binding"
)
LISTINGS = ("Layers:", "Engine Layer Information")


class Messages:
    """Messages since `clear`. facts: the few verbose messages that are read here."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all messages."""
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.facts: list[str] = []

    def mark(self) -> int:
        """Now, for errors_since."""
        return len(self.errors)

    def errors_since(self, mark: int) -> list[str]:
        """Errors after the first `mark` ones."""
        return self.errors[mark:]

    def take_warnings(self) -> list[str]:
        """The warnings since `clear` or the last call, each once, without harmless ones."""
        said, self.warnings = self.warnings, []
        return [one_line(text) for text in dict.fromkeys(said) if not HARMLESS.search(text)]

    def layers(self, num_profiles: int) -> list[list[Layer]]:
        """The layers of each profile of the engine, as the builder lists them; empty where it does
        not.
        """
        listings = (text for text in self.facts if text.startswith(LISTINGS))
        return parse_listing("\n".join(listings), num_profiles)

    @property
    def activation_bytes(self) -> int | None:
        """Device memory for intermediate results at the largest batch, as the builder says."""
        found = re.findall(r"Total Activation Memory: (\d+) bytes", "\n".join(self.facts))
        return max(map(int, found), default=None)

    @property
    def library_is_in_engine(self) -> bool:
        """Whether the plugin's library was serialized into the engine."""
        return any("plugin library" in text and "to plan" in text for text in self.facts)


@cache
def logger(trt: Any) -> tuple[Any, Messages]:
    """The logger of this process and what it hears. One for all builds: TensorRT-RTX keeps the
    first it is given.
    """
    messages, severity = Messages(), trt.ILogger.Severity

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                messages.errors.append(text)
            elif level == severity.WARNING:
                messages.warnings.append(text)
            elif text.startswith((*LISTINGS, "Total Activation")) or "plugin library" in text:
                messages.facts.append(text)

    return Logger(), messages


def judge(graph: str, warnings: Iterable[str]) -> list[str]:
    """The warnings that the user should see. Raises: UserError for one after which the engine
    cannot be trusted.
    """
    kept = []
    for warning in dict.fromkeys(text for text in warnings if not HARMLESS.search(text)):
        if FATAL.search(_said(warning)):
            raise UserError(
                f"{graph} would not be built as it was exported ({one_line(warning)}); use another"
                " version of TensorRT or another --target"
            )
        kept.append(one_line(warning))
    return kept


def one_line(text: str, max_characters: int = 300) -> str:
    """A message without line breaks and without the place in TensorRT's own sources in front."""
    text = " ".join(_said(text).split())
    return text if len(text) <= max_characters else text[:max_characters] + " …"


def _said(text: str) -> str:
    return re.sub(r"^(\S+\.(cpp|h|hpp):\d+:?|\[\S+\.cpp::\S+\])\s*", "", text.strip())
