"""Modules whose weights come from a file: nothing is computed that is then overwritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

INIT = "torch.nn.init"


class Uninitialized(TorchFunctionMode):
    """A context in which modules are made without initial values: their parameters hold whatever
    memory held.

    Cheaper than the meta device for a process that makes one small model: torch takes 1.3 s of
    processor time to load what meta tensors need.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == INIT:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
