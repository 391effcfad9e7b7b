"""Head maps: how far each query head looks beyond its neighborhood, and from that which heads are
semantic.

head_map.json is one object: version 2, the model's family, grid and shape, `metric` [layers][query
heads] in 0..1 (share of the image-to-image attention mass outside `neighborhood`, "1d:N" or "2d:N"
or "unknown"), `threshold`, where it came from, and optionally `cost_options` with `costs`
[layers][KV heads][options] (ssd-auto) and `statistics`.
Source: arXiv 2510.18716 section 3; ours differs in that a KV head's metric is the mean over its
query heads.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ssd_export.config import MAX_GRID_SIDE, Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.os_errors import is_file, os_error
from ssd_export.policy.table import HeadGroup, HeadOption, Rule, check_group
from ssd_export.typed_json import ABSENT_BY_DEFAULT, MAX_BYTES, parse_json, plain

VERSION = 2
BUILT_IN_DIRECTORY = Path(__file__).parent.parent / "head_maps"
SHAPE = ("family", "grid", "num_layers", "num_heads", "num_kv_heads", "hidden_size")
AGAIN = "run `ssd-export calibrate` again"
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadMap:
    """The metric of every query head of a model, and optionally the cost of every menu option by KV
    head.

    model_fingerprint "": fits any model of this shape. cost_options and costs are empty where not
    calibrated.
    assumed: why the map may not be this model's own; "" where it was measured on it.
    statistics: further numbers by name, such as the share of attention on the prompt; kept, not
    interpreted.
    """

    family: str
    grid: Grid
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    metric: Rows
    threshold: float
    neighborhood: str = "unknown"
    provenance: str = ""
    assumed: str = ""
    prompts_hash: str = ""
    model_fingerprint: str = ""
    tool_version: str = ""
    cost_options: tuple[HeadOption, ...] = ()
    costs: tuple[Rows, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)

    def kv_metric(self) -> Rows:
        """Metric of each KV head, [num_layers][num_kv_heads]: the mean over its query heads."""
        size = self.num_heads // self.num_kv_heads
        return tuple(
            tuple(
                sum(layer[start : start + size]) / size for start in range(0, self.num_heads, size)
            )
            for layer in self.metric
        )

    def semantic(self) -> tuple[tuple[bool, ...], ...]:
        """Types of the heads, [num_layers][num_kv_heads]: True for a semantic one (metric above the
        threshold).
        """
        return tuple(tuple(value > self.threshold for value in layer) for layer in self.kv_metric())

    @property
    def semantic_share(self) -> float:
        """Share of semantic heads, 0..1."""
        return sum(map(sum, self.semantic())) / (self.num_layers * self.num_kv_heads)

    def with_semantic_share(self, share: float) -> HeadMap:
        """The same map with the threshold that makes (about) this share of KV heads semantic."""
        if not 0 <= share <= 1:
            raise UserError(
                f"semantic share {share} is outside [0, 1]; use 0.5 for half of the heads"
            )
        values = sorted((value for layer in self.kv_metric() for value in layer), reverse=True)
        count = round(share * len(values))
        return replace(self, threshold=0.0 if count == len(values) else values[count])

    def first_layers(self, num_layers: int) -> HeadMap:
        """The map of a model that is cut off after some layers."""
        return replace(
            self,
            num_layers=num_layers,
            metric=self.metric[:num_layers],
            costs=self.costs[:num_layers],
            model_fingerprint="",
            statistics={},
        )

    def swapped(self) -> HeadMap:
        """Swaps the types as a control: semantic heads become spatial and spatial ones semantic."""
        metric = tuple(tuple(1 - value for value in layer) for layer in self.metric)
        return self._control(metric, 1 - self.threshold, "control: head types swapped")

    def random(self, seed: int) -> HeadMap:
        """Permutes the metrics among the KV heads as a control; as many heads are semantic as
        before.
        """
        size = self.num_heads // self.num_kv_heads
        starts = range(0, self.num_heads, size)
        heads = [layer[start : start + size] for layer in self.metric for start in starts]
        random.Random(seed).shuffle(heads)
        rows = [
            heads[index : index + self.num_kv_heads]
            for index in range(0, len(heads), self.num_kv_heads)
        ]
        metric = tuple(tuple(value for head in row for value in head) for row in rows)
        return self._control(
            metric, self.threshold, f"control: head types drawn at random, seed {seed}"
        )

    def _control(self, metric: Rows, threshold: float, provenance: str) -> HeadMap:
        provenance = f"{provenance}; {self.provenance}"
        return replace(
            self,
            metric=metric,
            threshold=threshold,
            provenance=provenance,
            cost_options=(),
            costs=(),
            statistics={},
        )

    @property
    def note(self) -> str:
        """Note for the user on a map that was not measured on the model; else ""."""
        if not self.assumed:
            return ""
        return f"head map assumed: {self.assumed}; run `ssd-export calibrate` to measure yours"

    def for_model(self, config: ModelConfig, fingerprint: str = "") -> HeadMap:
        """Returns the map if it is one of the model. Raises: UserError that names what differs."""
        for name in SHAPE:
            if getattr(self, name) != getattr(config, name):
                raise UserError(
                    f"the head map is for another model: {name} {getattr(self, name)}, the model "
                    f"has {getattr(config, name)}; {AGAIN} for this model or drop --head-map"
                )
        if self.model_fingerprint and fingerprint and self.model_fingerprint != fingerprint:
            raise UserError(
                "the head map is for another model of the same shape (fingerprint "
                f"{self.model_fingerprint[:12]}, the model has {fingerprint[:12]}); {AGAIN}"
            )
        return self

    def validate(self, source: str = "head map") -> HeadMap:
        """Returns the map if its numbers are valid. Raises: UserError for a wrong shape, NaN, no
        shares.
        """
        if (
            min(self.num_layers, self.num_heads, self.num_kv_heads) < 1
            or self.num_heads % self.num_kv_heads
        ):
            raise UserError(
                f"{source}: {self.num_heads} heads cannot share {self.num_kv_heads} KV heads; "
                f"{AGAIN}"
            )
        if not all(1 <= side <= MAX_GRID_SIDE for side in (self.grid.height, self.grid.width)):
            raise UserError(
                f"{source}: grid is {self.grid}, expected sides of 1 to {MAX_GRID_SIDE}; {AGAIN}"
            )
        _check_rows(self.metric, self.num_layers, self.num_heads, "metric", "heads", source)
        values = [self.threshold, *(value for layer in self.metric for value in layer)]
        if not all(-1e-6 <= value <= 1 + 1e-6 for value in values):
            raise UserError(f"{source}: metrics and the threshold are shares from 0 to 1; {AGAIN}")
        if len(self.costs) != (self.num_layers if self.cost_options else 0):
            raise UserError(
                f"{source}: costs of {len(self.costs)} layers, {self.num_layers} wanted; {AGAIN}"
            )
        for index, layer in enumerate(self.costs):
            what = f"costs of layer {index}"
            _check_rows(layer, self.num_kv_heads, len(self.cost_options), what, "options", source)
        if any(cost < 0 for layer in self.costs for head in layer for cost in head):
            raise UserError(f"{source}: a cost is below 0; {AGAIN}")
        for rule, image_slots, evict_every in self.cost_options:
            try:
                check_group(HeadGroup(rule, image_slots + 1, evict_every, 1), 1, self.grid)
            except UserError as error:
                raise UserError(
                    f"{source}: its option of {image_slots} image slots breaks the cache's rules;"
                    f" {AGAIN}"
                ) from error
        return self

    def to_dict(self) -> dict[str, Any]:
        """The map as plain data for JSON."""
        options = [
            {**plain(rule), "image_slots": image_slots, "evict_every": evict_every}
            for rule, image_slots, evict_every in self.cost_options
        ]
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"version": VERSION, **values, "grid": asdict(self.grid), "cost_options": options}

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """The map in a file. Raises: UserError if there is none or it is damaged."""
        try:
            content = read_file(Path(path), MAX_BYTES)
        except OSError as error:
            raise os_error(error, "read head map", path) from error
        version = parse_json(content, _Version, str(path), AGAIN).version
        if version != VERSION:
            raise UserError(
                f"{path}: head map version {version}, this tool reads {VERSION}; {AGAIN}"
            )
        file = parse_json(content, _HeadMapFile, str(path), AGAIN)
        options = tuple(option.as_option() for option in file.cost_options)
        values = {item.name: getattr(file, item.name) for item in fields(cls)}
        return cls(**{**values, "cost_options": options}).validate(str(path))

    def save(self, path: str | Path) -> None:
        """Writes the map, one layer a line. Raises: UserError if it is not whole or cannot be
        written.
        """
        values = self.validate().to_dict()
        try:
            Path(path).write_text(_readable(values), encoding="utf-8")
        except OSError as error:
            raise os_error(error, "write head map", path) from error


@dataclass(frozen=True)
class _Version:
    version: int = 0


@dataclass(frozen=True)
class _OptionEntry:
    """An option of `cost_options` as the file has it: a rule and two numbers side by side."""

    num_sinks: int
    num_recent: int
    by_score: bool
    image_slots: int
    evict_every: int
    pinned_columns: int = 0
    age_quota: bool = field(default=False, metadata=ABSENT_BY_DEFAULT)

    def as_option(self) -> HeadOption:
        rule = Rule(
            self.num_sinks, self.num_recent, self.by_score, self.pinned_columns, self.age_quota
        )
        return HeadOption(rule, self.image_slots, self.evict_every)


@dataclass(frozen=True, kw_only=True)
class _HeadMapFile(HeadMap):
    """The fields of head_map.json."""

    cost_options: tuple[_OptionEntry, ...] = ()  # type: ignore[assignment]


def find_head_map(
    config: ModelConfig,
    explicit: str | Path | None = None,
    fingerprint: str = "",
    model_dir: str | Path | None = None,
    assumed: str | None = None,
) -> HeadMap | None:
    """The map asked for, else head_map.json beside the checkpoint, else the built-in one that may
    be assumed, else None.

    Args: explicit: a file, the name of a built-in map that may be assumed, or a control of the map
    that would be found without it: "random:SEED" or "swapped". assumed: the name of the built-in
    map.
    Raises: UserError for a file that is missing, damaged or made for another model, a built-in map
    of another model, and a control of no map.
    """
    is_control = str(explicit) == "swapped" or str(explicit).startswith("random:")
    if explicit and not is_control:
        built_in = BUILT_IN_DIRECTORY / f"{explicit}.json"
        if not built_in.is_file():
            return HeadMap.load(explicit).for_model(config, fingerprint)
        head_map = HeadMap.load(built_in).for_model(config, fingerprint)
        if explicit != assumed:
            raise UserError(
                f"--head-map {explicit} is of a model of this shape whose heads are others: run"
                " `ssd-export calibrate` to measure this model's, or use a policy that needs no"
                " types of heads, such as --policy h2o"
            )
        return head_map
    found = _own_map(config, fingerprint, model_dir, assumed)
    if not is_control:
        return found
    if found is None:
        raise UserError(
            f"--head-map {explicit} needs this model's own map; run `ssd-export calibrate` first"
        )
    if explicit == "swapped":
        return found.swapped()
    seed = str(explicit).removeprefix("random:")
    if not seed.isdecimal():
        raise UserError(f"--head-map {explicit}: {seed!r} is not a seed; use random:0")
    return found.random(int(seed))


def _own_map(
    config: ModelConfig, fingerprint: str, model_dir: str | Path | None, assumed: str | None
) -> HeadMap | None:
    beside = Path(model_dir) / "head_map.json" if model_dir else None
    built_in = BUILT_IN_DIRECTORY / f"{assumed}.json"
    path = beside if beside and is_file(beside) else built_in
    return HeadMap.load(path).for_model(config, fingerprint) if is_file(path) else None


def _check_rows(
    rows: Rows, num_rows: int, num_columns: int, what: str, columns: str, source: str
) -> None:
    sizes = {len(row) for row in rows}
    if len(rows) != num_rows or sizes != {num_columns}:
        raise UserError(
            f"{source}: {what} has {len(rows)} rows of {sorted(sizes)} {columns}, "
            f"{num_rows} rows of {num_columns} wanted; {AGAIN}"
        )
    if not all(math.isfinite(value) for row in rows for value in row):
        raise UserError(f"{source}: {what} holds NaN or infinite values; {AGAIN}")


def _readable(values: dict[str, Any]) -> str:
    """JSON with one line for each key, and one for each item of a list."""
    lines = []
    for key, value in values.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, (list, tuple)) and value:
            text = (
                "[\n"
                + ",\n".join("    " + json.dumps(item, allow_nan=False) for item in value)
                + "\n  ]"
            )
        lines.append(f'  "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
