"""Chooses the window of lookahead that pays: what a pass costs beside a decode step, from bytes and
operations, and how many tokens it is likely to give.

pass(W) = operators x their fixed cost + bytes / bandwidth + W x operations / rate. The rates are
those of an ordinary core and an ordinary GPU, of which only the ratios matter. How often drafts are
right is counted while an image is generated, so that a window that does not pay is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

from ssd_export.bundle import Bundle
from ssd_export.config import ModelConfig
from ssd_export.plan.step_speed import packed_bytes, step_bytes
from ssd_export.policy.schedule import eviction_kind
from ssd_export.policy.table import PolicyTable

WINDOWS = (4, 6, 8, 12, 16, 24)
OFF = 1
OPERATORS_OF_A_LAYER = 65
OPERATORS_OF_A_FUSED_LAYER = 8  # of a decode step with the operators of engines/operators
MORE_OPERATORS = 1.9  # of a pass than of a step
OPERATORS_OF_AN_EVICTION = 13  # of a head group, in an evict graph
HAS_TO_SAVE = 0.05  # of a step's time, for what the model does not know
FIRST_GUESS = 0.3  # of how often a draft is right: single steps, which compare drafts at no cost
GUESSED = 4  # drafts that the guess counts for
REMEMBERED = 32  # drafts before the newest one that count
OPENING = 30  # decode steps that opening a graph takes where only one is open at a time
SHARES = 20  # of which the share of right drafts is a multiple


@dataclass(frozen=True)
class Rates:
    """Bytes and float operations a second; seconds that an operator takes beside them."""

    bandwidth: float
    matrix_rate: float
    operator: float


CORE = Rates(15e9, 60e9, 1.7e-6)
CORES_OF_BANDWIDTH = 3  # more read no faster
GPU = Rates(1e12, 50e12, 3e-6)


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass by its window. written: what each token of a window costs beside its
    operations, in steps, where a runner writes them one at a time; fixed: tokens that a pass
    computes whatever its window, 0 where it has no more; opening: decode steps that going from
    single steps to passes takes, or back; saved: what single steps save by operators that a pass
    does without; evicting: of each token, where passes evict by graphs and single steps do not.
    """

    overhead: float
    moving: float
    computing: float
    written: float = 0.0
    fixed: int = 0
    opening: int = 0
    saved: float = 0.0
    evicting: float = 0.0

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        num_images: int,
        num_threads: int,
        on_gpu: bool,
        written: float = 0.0,
        fixed: int = 0,
        opens_again: bool = False,
        fuses_steps: bool = False,
    ) -> PassCost:
        """The cost for so many images at once. opens_again: whether one graph is open at a time;
        fuses_steps: whether single steps have the operators of engines/operators.
        """
        rates, config, table = GPU, bundle.config.model, bundle.config.policy
        if not on_gpu:
            bandwidth = CORE.bandwidth * min(num_threads, CORES_OF_BANDWIDTH)
            rates = Rates(bandwidth, CORE.matrix_rate * num_threads, CORE.operator)
        saved, evicting, num_bytes = 0.0, 0.0, step_bytes(bundle, num_images)
        if fuses_steps:
            fewer = (OPERATORS_OF_A_LAYER - OPERATORS_OF_A_FUSED_LAYER) * config.num_layers
            saved = fewer * rates.operator
            evicting = OPERATORS_OF_AN_EVICTION * evictions_a_token(table) * rates.operator
            num_bytes -= packed_bytes(bundle)  # of a pass, too
        return cls(
            OPERATORS_OF_A_LAYER * config.num_layers * rates.operator,
            num_bytes / rates.bandwidth,
            step_operations(config, table, num_images) / rates.matrix_rate,
            written,
            fixed,
            OPENING * opens_again,
            saved,
            evicting,
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows to choose from."""
        return (self.fixed,) if self.fixed else WINDOWS

    @property
    def step(self) -> float:
        """Seconds of a decode step."""
        return self.overhead + self.moving + self.computing - self.saved

    def of_window(self, window: int) -> float:
        """Seconds of a pass over so many tokens of each image."""
        tokens = max(window, self.fixed)
        own = MORE_OPERATORS * self.overhead + self.moving + tokens * self.computing
        return own + tokens * self.written * self.step


def step_operations(config: ModelConfig, table: PolicyTable, num_images: int) -> int:
    """Float operations of a decode step: two for each weight and row, and those of the attention
    over all slots.
    """
    rows, hidden, head_dim = config.rows_per_image * num_images, config.hidden_size, config.head_dim
    attention = hidden * head_dim * 2 * (config.num_heads + config.num_kv_heads)
    weights = config.num_layers * (attention + 3 * hidden * config.intermediate_size)
    weights += hidden * hidden + hidden * config.codebook_size  # the generation head
    embedded = config.codebook_dim * hidden + hidden * hidden  # one row for both rows of an image
    slots = sum(group.num_heads * group.num_slots for group in table.groups())
    attended = 2 * slots * config.query_group_size * head_dim
    return 2 * (rows * (weights + attended) + num_images * embedded)


def evictions_a_token(table: PolicyTable) -> float:
    """Evictions of head groups between steps, for each token."""
    return sum(
        1 / group.evict_every for group in table.groups() if eviction_kind(table, group) is not None
    )


def expected_widths(rooms: Sequence[int], window: int, share: float) -> list[int]:
    """Tokens that each pass of an image tries, if drafts are right with this share, each by itself.

    Args: rooms: as policy/schedule.py has them.
    """
    gained = [0.0, *accumulate(share**place for place in range(window))]  # tokens by width
    step, widths, num_steps = 1.0, [], len(rooms)
    while step < num_steps:
        width = min(window, rooms[int(step)])
        widths.append(width)
        step += gained[width]
    return widths


@dataclass
class AutoWindow:
    """The window that pays best for one image, chosen anew as drafts turn out right or wrong. It
    begins with single steps.
    """

    cost: PassCost
    rooms: Sequence[int]
    share: float = FIRST_GUESS
    _counted: int = GUESSED  # drafts behind the share
    _window: int = OFF
    _best: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows that it chooses from."""
        return self.cost.windows

    @property
    def could_pay(self) -> bool:
        """Whether some window pays where every draft is right."""
        return self._choose(1.0)[1] > self.cost.opening

    def __call__(self, step: int) -> int:
        """Tokens of the pass from a step on, OFF for a single step."""
        rounded = round(self.share * SHARES)
        if rounded not in self._best:
            self._best[rounded] = self._choose(rounded / SHARES)
        window, saved = self._best[rounded]
        saved *= (len(self.rooms) - step) / len(self.rooms)
        is_worth_it = saved > (self.cost.opening if self._window == OFF else -self.cost.opening)
        self._window = window if is_worth_it else OFF
        return self._window

    def drafts(self, right: int, wrong: int) -> None:
        """Takes how the drafts of a pass turned out, up to the first wrong one."""
        for was_right in (True,) * right + (False,) * wrong:
            self.share += (was_right - self.share) / (self._counted + 1)
            self._counted = min(self._counted + 1, REMEMBERED)

    def _choose(self, share: float) -> tuple[int, float]:
        """The best window if drafts are right with this share, and the single steps' time of an
        image that it saves; less than 0 where it has to save more.
        """
        return _best_window(self.cost, tuple(self.rooms), share)


@lru_cache(maxsize=256)  # one image after the other asks the same
def _best_window(cost: PassCost, rooms: tuple[int, ...], share: float) -> tuple[int, float]:
    """The choice of AutoWindow."""
    seconds = {}
    for window in cost.windows:
        of_width = [cost.of_window(width) for width in range(window + 1)]
        widths = expected_widths(rooms, window, share)
        seconds[window] = sum(of_width[width] for width in widths)
        seconds[window] += cost.evicting * (len(rooms) - 1)
    best = min(seconds, key=lambda window: seconds[window])
    limit = (1 - HAS_TO_SAVE) * (len(rooms) - 1) * cost.step
    return best, (limit - seconds[best]) / cost.step
