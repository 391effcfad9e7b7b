"""An iterator that computes, as an asynchronous one: each of its steps runs in one other thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


async def in_thread(make: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Yields what the iterator of make() yields, and raises what either raises.

    All steps run in the same thread. Where the caller stops early, or is cancelled, the iterator is
    closed there after the step that is under way.
    """
    thread = ThreadPoolExecutor(1, "ssd-export-stream")
    loop = asyncio.get_running_loop()
    iterator: Iterator[T] | None = None

    def close() -> None:
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()

    try:
        iterator = await loop.run_in_executor(thread, make)
        while (item := await loop.run_in_executor(thread, next, iterator, _END)) is not _END:
            yield item
    finally:
        closing = loop.run_in_executor(thread, close)
        thread.shutdown(wait=False)
        await asyncio.shield(closing)
