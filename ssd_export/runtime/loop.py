"""The one decode loop: prefill, then every step with the evictions that are due before it.

A generator, so that its caller decides what happens between the parts: preview, measure, compare
with another runner that goes in step, or stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ssd_export.config import Grid
from ssd_export.policy.schedule import eviction_steps
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner


def decode(
    runner: Runner, batch: PromptBatch, table: PolicyTable, parts: Iterable[range] | None = None
) -> Iterator[range]:
    """Generates the image tokens of a batch, and yields the steps that were taken.

    range(0, 1) is the prefill, which generates token 0; then come the parts. A backend that queues
    work may still be busy with them until its tokens are asked for.

    Args: parts: consecutive decode steps to take between two yields; None: grid rows.
    """
    evictions = eviction_steps(table, batch.lengths.tolist())
    runner.prefill(batch)
    yield range(1)
    for steps in grid_rows(table.grid) if parts is None else parts:
        runner.decode_row(steps, evictions)
        yield steps


def grid_rows(grid: Grid, first: int = 1) -> list[range]:
    """The decode steps from `first` on, a grid row at a time. Step 0 is the prefill's."""
    starts = range(0, grid.num_tokens, grid.width)
    rows = (range(start, start + grid.width) for start in starts)
    return [range(max(first, row.start), row.stop) for row in rows if row.stop > first]


def single_steps(num_tokens: int, first: int = 1) -> list[range]:
    """The decode steps from `first` on up to num_tokens tokens, one at a time."""
    return [range(step, step + 1) for step in range(first, num_tokens)]
