"""A policy, and what is changed of it, in one word: h2o@evict-every=24, ssd-row@head-map=swapped,
ssd-auto@groups=1.

Keys are the options of `export` that decide a policy: window, evict-every, num-recent, lookahead (1
is off), groups and head-map (a file, a built-in map, random:SEED, swapped). Two more are for
comparisons: num-sinks (first prompt tokens that are never evicted; -1 is the whole prompt) and
groups=unlimited, which no bundle holds: torch alone replays it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ssd_export.errors import UserError
from ssd_export.policy.make import make_policy
from ssd_export.policy.presets import MAX_GROUPS, POLICIES, Heads
from ssd_export.policy.table import PolicyTable

if TYPE_CHECKING:
    from ssd_export.export.temporary_bundle import PolicyChoice
    from ssd_export.model.checkpoint import Checkpoint

# What can be changed, and the least that makes sense; -1 sinks are the whole prompt.
LEAST = {
    "window": 1,
    "evict-every": 1,
    "num-recent": 0,
    "num-sinks": -1,
    "groups": 1,
    "lookahead": 1,
}
NUMBERS = tuple(LEAST)
KEYS = (*NUMBERS, "head-map")
UNLIMITED = "unlimited"
SHOWN = "write h2o@evict-every=24"


@dataclass(frozen=True)
class Variant:
    """A policy with changed numbers. name: as it was spelled; changes: fields of PolicyChoice and
    their values.
    """

    name: str
    policy: str
    changes: tuple[tuple[str, int | str], ...] = ()
    has_bundle: bool = True

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parses `policy` or `policy:key=value,...`. Raises: UserError for an unknown policy or
        key, or a value that is no number where one is wanted.
        """
        policy, *parts = text.split("@")
        if policy not in POLICIES:
            raise UserError(
                f"--policies: unknown policy {policy or '(none)'}; choose from"
                f" {', '.join(POLICIES)}"
            )
        unlimited = f"groups={UNLIMITED}" in parts
        allocated = [row.name for row in POLICIES.values() if row.heads is Heads.ALLOCATED]
        if unlimited and (policy not in allocated or len(parts) > 1):
            raise UserError(
                f"--policies {text}: only {' or '.join(allocated)}, with nothing else changed, can"
                f" have unlimited groups; use {allocated[0]}@groups={UNLIMITED}"
            )
        return cls(
            text,
            policy,
            () if unlimited else tuple(_change(text, part) for part in parts),
            not unlimited,
        )

    def choice(self, model: str, budget: float, head_map: str | None) -> PolicyChoice:
        """Options for export; head_map unless the variant has its own."""
        from ssd_export.export.temporary_bundle import PolicyChoice

        changes: dict[str, Any] = dict(self.changes)
        return replace(PolicyChoice(model, self.policy, budget, head_map), **changes)

    def table(self, choice: PolicyChoice, checkpoint: Checkpoint) -> PolicyTable:
        """The policy table under a choice. Raises: UserError where there is none: no head map, a
        budget too small.
        """
        from ssd_export.export.exporter import settle_policy
        from ssd_export.model.families import prompt_slots_of
        from ssd_export.policy.allocation import allocate_each_head

        if self.has_bundle:
            return settle_policy(choice.export_spec(), checkpoint)[0]
        config = checkpoint.config
        head_map = checkpoint.head_map(choice.head_map)
        if head_map is None:
            raise UserError(f"{self.name} needs a head map with costs; run `ssd-export calibrate`")
        heads = allocate_each_head(head_map, choice.budget).heads
        return make_policy(
            self.policy,
            config,
            budget=choice.budget,
            prompt_slots=prompt_slots_of(config, choice.prompt_slots),
            groups=config.num_kv_heads,
            allocation=heads,
        )


def _change(text: str, part: str) -> tuple[str, int | str]:
    key, _, value = part.partition("=")
    if key not in KEYS or not value:
        raise UserError(
            f"--policies {text}: {part!r} is not KEY=VALUE with a key of {', '.join(KEYS)}; {SHOWN}"
        )
    if key not in NUMBERS:
        return key.replace("-", "_"), value
    try:
        number = int(value)
    except ValueError:
        raise UserError(
            f"--policies {text}: {key} wants a whole number, not {value!r}; {SHOWN}"
        ) from None
    if number < LEAST[key]:
        raise UserError(
            f"--policies {text}: {key}={number} is below {LEAST[key]}; use"
            f" {key}={max(LEAST[key], 1)} or more"
        )
    if key == "groups" and not 1 <= number <= MAX_GROUPS:
        raise UserError(
            f"--policies {text}: groups={number} is outside 1..{MAX_GROUPS}; use"
            f" groups={MAX_GROUPS} or {UNLIMITED}"
        )
    return key.replace("-", "_"), number
