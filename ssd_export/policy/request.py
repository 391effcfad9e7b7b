"""Checks the numbers that a user sets of a policy."""

from __future__ import annotations

from ssd_export.errors import UserError
from ssd_export.policy.presets import POLICIES, Heads, Policy
from ssd_export.policy.table import MAX_LOOKAHEAD

LEAST = {"evict_every": 1, "num_recent": 0, "num_sinks": -1}  # a window's depends on the grid


def check_request(policy: Policy, budget: float, asked: dict[str, int]) -> None:
    """Raises UserError for a budget or number that is impossible, or that the policy does not
    take.
    """
    if not 0 < budget <= 1:
        raise UserError(
            f"budget={budget} is outside (0, 1]; use 0.2 to keep a fifth of the image tokens"
        )
    if "lookahead" in asked and policy.heads is Heads.EVERYTHING:
        raise UserError(
            f"policy {policy.name} evicts nothing, so that it cuts no pass of lookahead; drop"
            " --lookahead, which `generate` takes with every bundle"
        )
    for option, value in asked.items():
        if option not in policy.options:
            others = [row.name for row in POLICIES.values() if option in row.options]
            raise UserError(
                f"policy {policy.name} takes no {option}; drop --{option.replace('_', '-')}, or use"
                f" --policy {' or '.join(others)}"
            )
        if value < LEAST.get(option, value):
            raise UserError(f"{option}={value} is too small; use {option} >= {LEAST[option]}")
    if "lookahead" in asked:
        check_lookahead(asked["lookahead"])
        _check_multiples(asked["lookahead"], asked)


def check_lookahead(lookahead: int) -> None:
    """Raises UserError for fewer or more tokens than a pass can try."""
    if not 2 <= lookahead <= MAX_LOOKAHEAD:
        raise UserError(f"lookahead={lookahead} is outside 2 .. {MAX_LOOKAHEAD}; use 8")


def _check_multiples(lookahead: int, asked: dict[str, int]) -> None:
    """Raises UserError for a number that is no multiple of lookahead and has to be."""
    for option in ("evict_every", "window"):
        value = asked.get(option, lookahead)
        if value > 0 and value % lookahead:
            below, above = value // lookahead * lookahead, -(-value // lookahead) * lookahead
            ways = [str(number) for number in (below, above) if number]
            raise UserError(
                f"{option}={value} is no multiple of lookahead={lookahead}; use {' or '.join(ways)}"
            )
