"""Makes the table of an export: heads allocated where the policy allocates, and evicting together
where that is harmless.

A pass of lookahead ends where some head has to evict. Heads that evict before the same steps cut
few passes short, for a little of each head's choice of size; docs/decisions has what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.policy.allocation import Allocation, allocate
from ssd_export.policy.costs import LEAST_COST
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.make import make_policy
from ssd_export.policy.presets import DEFAULT_GROUPS, Heads, policy_of
from ssd_export.policy.table import PolicyTable

EACH_FOR_ITSELF = 1  # the lookahead of heads that evict before steps of their own
PARTS_OF_A_ROW = (3, 6)  # usual lookaheads: a third of a grid row, else a sixth
MOST_LOSS = 2.0  # times the predicted loss of heads that evict each for itself
LEAST_ROWS = 4  # of mean image slots of a head, where no loss is predicted; fewer lose images


def usual_policy(
    name: str,
    config: ModelConfig,
    *,
    budget: float,
    lookahead: int | None = None,
    head_map: HeadMap | None = None,
    groups: int = DEFAULT_GROUPS,
    prompt_slots: int = 64,
    **numbers: int | None,
) -> PolicyTable:
    """The table of a named policy as `export` makes it.

    Args: lookahead: tokens between two steps before which heads evict, or a multiple;
    EACH_FOR_ITSELF for none; None for the most that suits the policy (`_suitable`). numbers: of
    make_policy.
    Raises: UserError as make_policy and allocate do.
    """
    allocates = policy_of(name).heads is Heads.ALLOCATED and 0 < budget < 1

    def made(lookahead: int | None) -> tuple[PolicyTable, Allocation | None]:
        allocated = None
        if allocates and head_map is not None and head_map.cost_options:
            allocated = allocate(head_map, budget, groups, lookahead)
        table = make_policy(
            name,
            config,
            budget=budget,
            prompt_slots=prompt_slots,
            head_map=head_map,
            groups=groups,
            allocation=None if allocated is None else allocated.heads,
            lookahead=lookahead,
            **numbers,
        )
        return table, allocated

    if lookahead is not None:
        return made(None if lookahead == EACH_FOR_ITSELF else lookahead)[0]
    alone, cost = made(None)
    for tokens in _suitable(name, config, budget):
        try:
            together, its_cost = made(tokens)
        except UserError:  # too few slots, or a number that is no multiple
            continue
        if cost is None or its_cost is None or _is_harmless(its_cost, cost):
            return together
    return alone


def _suitable(name: str, config: ModelConfig, budget: float) -> Iterator[int]:
    """Lookaheads to try, large before small: none where a policy is published otherwise, or where
    few slots are shared out without predicting what is lost.
    """
    policy, width = policy_of(name), config.grid.width
    if not policy.evicts_together or budget == 1:
        return
    slots = Fraction(str(budget)) * config.grid.num_tokens
    if policy.heads is Heads.ALLOCATED or slots >= LEAST_ROWS * width:
        yield from (width // part for part in PARTS_OF_A_ROW if width // part > 1)


def _is_harmless(together: Allocation, alone: Allocation) -> bool:
    return together.cost <= MOST_LOSS * alone.cost + LEAST_COST
