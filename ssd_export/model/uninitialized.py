"""Modules whose weights come from a file: nothing is computed that is then overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

INIT = "torch.nn.init"


class Uninitialized(TorchFunctionMode):
    """A context in which modules are made without initial values: their parameters hold whatever
    memory held.
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


@contextmanager
def shapes_alone() -> Iterator[None]:
    """A context in which modules are made of meta tensors, which take no memory.

    Without initial values either: for those of a meta tensor torch loads its compiler, 2 s of
    processor time.
    """
    with torch.device("meta"), Uninitialized():
        yield
