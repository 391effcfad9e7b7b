"""A double of CUDA graphs on the CPU: a captured step is the list of operators that it called on
its tensors, and a replay calls them again on the same memory.

So what a step took from Python (a step's number, a tensor made anew, a branch) is frozen, as in a
CUDA graph, and what asks the host is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from ssd_export.cache.state import GroupState

ASKS_THE_HOST = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero")


class RecordedStep(TorchDispatchMode):
    """Records operators, and whole calls of functions that `call` wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.num_captures = self.num_replays = 0
        self._before: dict[int, tuple[Any, Any]] | None = None  # storages and what they held

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """How TorchRunner captures. Unlike CUDA's, the capture itself runs the step, so what it
        changes is put back.
        """
        self.calls, self._before = [], {}
        self.num_captures += 1
        try:
            with self:
                step()
        finally:
            changed, self._before = self._before, None
            for storage, held in changed.values():
                storage.copy_(held)
        return self.replay

    def replay(self) -> None:
        """Runs the step's operators again."""
        self.num_replays += 1
        for call in self.calls:
            call()

    def wrap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that is recorded as one call, whatever it does, as a kernel is."""

        def recorded(*args: Any) -> Tensor:
            if self._before is None:
                return function(*args)
            with _disable_current_modes():
                for state in tree_flatten(args)[0]:
                    if isinstance(state, GroupState):
                        self._keep(state.key, state.value, state.position, state.score)
                out = function(*args)
            self.calls.append(lambda: _copy_into(out, function(*args)))
            return out

        return recorded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name in ASKS_THE_HOST:
            raise RuntimeError(f"{name} asks the host within a step")
        kwargs = kwargs or {}
        written = [
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        ]
        self._keep(*(arg for arg, is_written in zip(args, written, strict=False) if is_written))
        out = func(*args, **kwargs)
        self.calls.append(lambda: _copy_into(out, func(*args, **kwargs)))
        return out

    def _keep(self, *tensors: Tensor | None) -> None:
        """Remembers what memory held before the step first writes to it."""
        assert self._before is not None
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))


def _copy_into(before: Any, now: Any) -> None:
    """The new result where the recorded one lies; nothing for a view or what was done in place."""
    for old, new in zip(tree_flatten(before)[0], tree_flatten(now)[0], strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)
