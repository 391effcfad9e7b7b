"""Lines of text for `export` and `calibrate`: the choice of ssd-auto and its expected loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssd_export.config import ModelConfig
    from ssd_export.policy.head_map import HeadMap
    from ssd_export.policy.table import HeadGroup, PolicyTable


def group_lines(table: PolicyTable) -> list[str]:
    """One line a layer: heads x image slots and rule of each group; and when they evict."""
    wide = len(str(len(table.layers) - 1))
    together = (
        "each head evicts as suits it"
        if table.lookahead is None
        else f"all heads evict before the same steps, {table.lookahead} tokens apart or a multiple"
    )
    return [
        *(
            f"layer {index:>{wide}}  " + "   ".join(_group(group, table) for group in groups)
            for index, groups in enumerate(table.layers)
        ),
        together,
    ]


def predicted_lines(head_map: HeadMap, config: ModelConfig, table: PolicyTable) -> list[str]:
    """The summed cost of a table and of the policies that need no costs, at as many slots."""
    from ssd_export.errors import UserError
    from ssd_export.policy.costs import predicted_error
    from ssd_export.policy.make import make_policy

    slots = table.prompt_slots
    rivals: dict[str, dict[str, Any]] = {
        "ssd-row": {"head_map": head_map},
        "h2o": {"evict_every": config.grid.width},
        "streaming-llm": {},
    }
    errors = {table.name: predicted_error(table, head_map)}
    for name, options in rivals.items():
        try:
            rival = make_policy(name, config, budget=table.budget, prompt_slots=slots, **options)
            errors[name] = predicted_error(rival, head_map)
        except UserError:  # this budget is too small for that policy
            continue
    own = errors[table.name]
    listed = ", ".join(
        f"{name} {error:.3g}" + (f" ({error / own:.1f}x)" if own and name != table.name else "")
        for name, error in errors.items()
    )
    return [
        f"predicted error at {table.image_slots_mean:.1f} image slots a head, nats per image token:"
        f" {listed}"
    ]


def _group(group: HeadGroup, table: PolicyTable) -> str:
    kind = "scored" if group.rule.by_score else "window"
    return f"{group.num_heads} x {kind} {table.option(group).image_slots}"
