"""ssd-export inspect: what is in a bundle, every file checked on the way."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import Argument, verb
from ssd_export.dtypes import DTYPES
from ssd_export.typed_json import report_json

if TYPE_CHECKING:
    from ssd_export.bundle import Bundle
    from ssd_export.policy.table import HeadGroup, PolicyTable

WIDTH_OF_A_PIPE = 160  # no line is folded in a file or a pipe


@verb(
    Argument(("bundle",), {"required": False, "type": options.FILE}),
    options.as_json,
)
def command(bundle: Path | None, as_json: bool) -> None:
    """Show what is in a bundle.

    Model, policy, slots by layer and head group, cache bytes of an image against a full cache,
    graphs, precision and engines of BUNDLE (default: the one exported last from this folder). Every
    file is checked on the way.
    """
    from ssd_export.bundle import open_bundle, resolve_bundle

    facts = bundle_facts(open_bundle(resolve_bundle(bundle)))
    if as_json:
        click.echo(report_json(facts))
    else:
        _print_tables(facts)
    for fault in facts["faults"]:
        click.echo(fault, err=True)


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Everything that inspect shows, as plain data; bytes are those of one image."""
    config = bundle.config
    table, model = config.policy, config.model
    size, rows = DTYPES[config.dtype].num_bytes, model.rows_per_image
    sizes = {name: entry.bytes for name, entry in bundle.files.items()}
    return {
        "path": str(bundle.path),
        "hash": bundle.hash,
        "schema_version": config.schema_version,
        "tool_version": config.tool_version,
        "dtype": config.dtype,
        "precision": asdict(config.precision),
        "int8_decoder": config.int8_decoder and asdict(config.int8_decoder),
        "model": {
            **model.to_dict(),
            "num_image_tokens": model.grid.num_tokens,
            "image_size": [model.image_height, model.image_width],
        },
        "layers_of_the_model": config.layers_of_the_model,
        "model_revision": config.model_revision,
        "policy": {
            "name": table.name,
            "budget": table.budget,
            "budget_in_force": table.budget_in_force,
            "image_slots_mean": table.image_slots_mean,
            "prompt_slots": table.prompt_slots,
            "score_decay": table.score_decay,
            "kv_dtype": table.kv_dtype,
            "lookahead": table.lookahead,
            "notes": list(table.notes),
            "layers": _layers(table),
        },
        "bytes_per_image": {
            "cache": table.cache_bytes(model, size, rows),
            "full_cache": table.full_cache_bytes(model, size, rows),
            "image_slots": table.image_cache_bytes(model, size, rows),
            "full_image_slots": table.full_image_cache_bytes(model, size, rows),
        },
        "graphs": {name: size for name, size in sizes.items() if name.startswith("onnx/")},
        "engines": {name: size for name, size in sizes.items() if name.startswith("engines/")},
        "faults": bundle.faults(),
        "reports": [name for name in sizes if name.startswith("reports/")],
        "total_bytes": sum(sizes.values()),
    }


def _layers(table: PolicyTable) -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "rule": _rule(group, table),
                "num_heads": group.num_heads,
                "num_slots": group.num_slots,
                "evict_every": group.evict_every,
            }
            for group in groups
        ]
        for groups in table.layers
    ]


def _rule(group: HeadGroup, table: PolicyTable) -> str:
    """The tokens that the heads of a group keep, in words."""
    rule = group.rule
    if group.num_slots >= table.full_slots:
        return "everything"
    parts = [
        "highest scores" if rule.by_score else "newest tokens",
        "the prompt" if rule.num_sinks < 0 else f"{rule.num_sinks} sinks" if rule.num_sinks else "",
        f"{rule.num_recent} recent" if rule.num_recent else "",
        (
            "grid columns "
            + ", ".join(str(c) for c in range(table.grid.width) if rule.pinned_columns >> c & 1)
            if rule.pinned_columns
            else ""
        ),
        "older and newer evicted equally" if rule.age_quota else "",
    ]
    return " + ".join(part for part in parts if part)


def _print_tables(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def table(*columns: str, text: int = 1) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            made.add_column(column, justify="left" if index < text else "right", overflow="fold")
        return made

    summary = table("bundle", escape(facts["path"]), text=2)
    for name, value in _summary(facts):
        summary.add_row(name, escape(value))
    slots = table("layers", "keeps", "KV heads", "slots", "evict every", text=2)
    for layers, groups in _alike(facts["policy"]["layers"]):
        for index, group in enumerate(groups):
            slots.add_row(
                "" if index else layers,
                group["rule"],
                *(str(group[key]) for key in ("num_heads", "num_slots", "evict_every")),
            )
    files = table("file", "size")
    for name, size in (*facts["graphs"].items(), *facts["engines"].items()):
        files.add_row(escape(name), _size(size))
    files.add_row("all files", _size(facts["total_bytes"]))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_PIPE
    console.print(summary, slots, files)


def _lookahead_lines(lookahead: int | None) -> list[tuple[str, str]]:
    if lookahead is None:
        return []
    return [("", f"heads evict before the same steps, at least {lookahead} apart, for lookahead")]


def _summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    policy, model, size = facts["policy"], facts["model"], facts["bytes_per_image"]
    return [
        (
            "model",
            (
                f"{_layer_count(facts)} layers, {model['num_heads']} heads, {model['num_kv_heads']}"
                f" KV heads of {model['head_dim']}, hidden size {model['hidden_size']},"
                f" {' x '.join(map(str, model['image_size']))} pixels"
            ),
        ),
        *((("revision", facts["model_revision"]),) if facts["model_revision"] else ()),
        *((("prompts", model["prompt_template"]),) if model["prompt_template"] else ()),
        ("precision", facts["dtype"]),
        *(("", line) for line in _weight_lines(facts["precision"])),
        *_decoder_rows(facts["int8_decoder"]),
        *(
            [("", "keys and values of the cache in int8, a scale for every token and head")]
            if policy["kv_dtype"] == "int8"
            else []
        ),
        ("policy", f"{policy['name']}, budget {policy['budget']:g}"),
        *_lookahead_lines(policy["lookahead"]),
        *(("", note) for note in policy["notes"]),
        (
            "slots of a head",
            (
                f"{policy['image_slots_mean']:.1f} of {model['num_image_tokens']} for image tokens"
                f" on average (budget in force {policy['budget_in_force']:.4f}) and"
                f" {policy['prompt_slots']} for the prompt"
            ),
        ),
        (
            "cache of an image",
            (
                f"{_size(size['cache'])}; full cache {_size(size['full_cache'])} "
                f"({_share(size['cache'], size['full_cache'])})"
            ),
        ),
        (
            "  its image slots",
            (
                f"{_size(size['image_slots'])}; full cache {_size(size['full_image_slots'])} "
                f"({_share(size['image_slots'], size['full_image_slots'])})"
            ),
        ),
        ("engines", ", ".join(sorted({name.split("/")[1] for name in facts["engines"]})) or "none"),
        ("hash", facts["hash"]),
        (
            "written by",
            f"ssd-export {facts['tool_version']}, schema version {facts['schema_version']}",
        ),
    ]


def _decoder_rows(int8_decoder: dict[str, Any] | None) -> list[tuple[str, str]]:
    from ssd_export.bundle.config import Int8Decoder, decoder_line

    return [] if int8_decoder is None else [("", decoder_line(Int8Decoder(**int8_decoder)))]


def _weight_lines(precision: dict[str, Any]) -> list[str]:
    """Lines on how matrices are stored, where that is not the model's dtype."""
    named = {"the layers'": precision["weights"], "the generation head's": precision["head"]}
    by_format: dict[str, list[str]] = {}
    for owner, format in named.items():
        by_format.setdefault(format, []).append(owner)
    by_format.pop("none", None)
    if not by_format:
        return []
    lines = [
        f"{' and '.join(owners)} matrices in {format}, {_scales(format, precision['block'])}"
        for format, owners in by_format.items()
    ]
    lines[-1] += f": {_size(precision['quantized_bytes'])} with their scales"
    others = sorted(set(precision["other_blocks"].values()), reverse=True)
    for block in others:
        count = sum(own == block for own in precision["other_blocks"].values())
        lines.append(f"{count} of them in blocks of {block}, which divides their inputs")
    kept = len(precision["kept"])
    return lines + ([f"{kept} matrices as they are: no block divides their inputs"] if kept else [])


def _scales(format: str, block: int | None) -> str:
    return f"blocks of {block} inputs" if format == "int4" else "a scale for every output channel"


def _layer_count(facts: dict[str, Any]) -> str:
    have, whole = facts["model"]["num_layers"], facts["layers_of_the_model"]
    return str(have) if have == whole else f"the first {have} of {whole}"


def _alike(layers: list[Any]) -> list[tuple[str, Any]]:
    """Neighboring layers with equal groups as one: ("0-5", groups)."""
    runs: list[tuple[int, int, Any]] = []
    for index, groups in enumerate(layers):
        if runs and runs[-1][2] == groups:
            runs[-1] = (runs[-1][0], index, groups)
        else:
            runs.append((index, index, groups))
    return [
        (f"{first}-{last}" if first < last else str(first), groups) for first, last, groups in runs
    ]


def _size(num_bytes: int) -> str:
    """1.25 MB: decimal units, three digits."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{value:#.3g}".rstrip(".") + f" {unit}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
