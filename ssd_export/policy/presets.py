"""Named cache policies, a row each; rules are cited by the numbers of policy/__init__.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.policy.table import FULL

MAX_GROUPS = 3  # of a layer
# Each adds operators to every step; a third gains at small budgets (docs/heads.md).
DEFAULT_GROUPS = 2
Recent = Callable[[int, Grid], int]  # of (image slots, grid): newest tokens that are protected


class Heads(Enum):
    """The way a policy gives each head its rule and size."""

    EVERYTHING = "all heads keep everything"
    ALIKE = "all heads have the policy's rule and an equal share of the budget"
    BY_TYPE = "spatial heads keep a window, semantic heads have the policy's rule"
    ALLOCATED = "each head has the option that a calibration found cheapest for it"


def no_guard(slots: int, grid: Grid) -> int:
    """No token is protected for being recent."""
    return 0


def half_of_the_slots(slots: int, grid: Grid) -> int:
    """Half of the slots protect the newest tokens, as in H2O."""
    return slots // 2


def two_grid_rows(slots: int, grid: Grid) -> int:
    """Tokens of two grid rows are protected."""
    return 2 * grid.width


def no_columns(grid: Grid) -> int:
    """No grid column is pinned."""
    return 0


def margin_columns(grid: Grid) -> int:
    """The first column and the last two."""
    return 1 | 0b11 << grid.width - 2


@dataclass(frozen=True)
class Policy:
    """Definition of a policy; adding one takes a row of POLICIES and one in the README's table.

    by_score: heads rank by score, else by position (R3); num_recent: R3's default of it;
    score_decay: R2; pinned_columns, age_quota: R3's; row_buffer: an eviction frees a grid row of
    slots unless told otherwise, else one (R7); options: numbers that a user may set;
    evicts_together: heads may evict before the same steps without being asked to. Where head types
    are told apart, all of this is about semantic heads.
    """

    name: str
    heads: Heads
    by_score: bool = True
    num_recent: Recent = no_guard
    score_decay: float = 1.0
    pinned_columns: Callable[[Grid], int] = no_columns
    age_quota: bool = False
    row_buffer: bool = False
    options: tuple[str, ...] = ("evict_every", "num_recent", "num_sinks", "lookahead")
    evicts_together: bool = False

    @property
    def needs_head_map(self) -> bool:
        """Whether the policy depends on a head map."""
        return self.heads in (Heads.BY_TYPE, Heads.ALLOCATED)


BY_TYPE_OPTIONS = ("window", "evict_every", "num_recent", "num_sinks", "lookahead")
POLICIES: dict[str, Policy] = {
    row.name: row
    for row in (
        Policy(FULL, Heads.EVERYTHING, options=()),
        Policy("ssd-auto", Heads.ALLOCATED, options=("lookahead",), evicts_together=True),
        Policy(
            "ssd-row",
            Heads.BY_TYPE,
            num_recent=half_of_the_slots,
            row_buffer=True,
            options=BY_TYPE_OPTIONS,
            evicts_together=True,
        ),
        Policy("ssd", Heads.BY_TYPE, num_recent=half_of_the_slots, options=BY_TYPE_OPTIONS),
        Policy("streaming-llm", Heads.ALIKE, by_score=False),
        Policy("h2o", Heads.ALIKE, num_recent=half_of_the_slots),
        Policy("tova", Heads.ALIKE, score_decay=0.0),
        Policy("linear", Heads.ALIKE, num_recent=two_grid_rows, score_decay=0.0, row_buffer=True),
        Policy(
            "headkv",
            Heads.BY_TYPE,
            num_recent=two_grid_rows,
            age_quota=True,
            row_buffer=True,
            options=BY_TYPE_OPTIONS,
        ),
        Policy(
            "margin",
            Heads.BY_TYPE,
            by_score=False,
            pinned_columns=margin_columns,
            row_buffer=True,
            options=BY_TYPE_OPTIONS,
        ),
    )
}


def policy_of(name: str) -> Policy:
    """The policy of that name. Raises: UserError where there is none."""
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def default_policy(has_costs: bool, has_options: bool) -> str:
    """The policy of a model that none was asked for.

    Args: has_costs: its head map has costs to allocate by; has_options: numbers were asked for,
    which an allocation would choose itself.
    """
    heads = Heads.ALLOCATED if has_costs and not has_options else Heads.BY_TYPE
    return next(policy.name for policy in POLICIES.values() if policy.heads is heads)
