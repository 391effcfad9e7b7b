"""The policy table: which slots a cache has and by which rule each head keeps them (R1-R9, see
policy.py).

Plain data without torch or numpy: a board reads it from ssd_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ssd_export.config import Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.typed_json import ABSENT_BY_DEFAULT, plain

BYTES_POSITION, BYTES_SCORE = 4, 4  # int32 and float32, whatever the dtype of keys and values
BYTES_ROW_SCALE = 4  # float32, of one key or value in int8
GREATEST_CODE = 127.0
LEAST_SCALE = 1e-30  # of a row of zeros, which would divide by zero
KV_DTYPES = ("model", "int8")
MAX_LOOKAHEAD = 64  # tokens of an image that a pass tries
MAX_PINNED_COLUMNS = 32  # bits of the mask that kernels and graphs take


@dataclass(frozen=True)
class Rule:
    """The rule of a group: what R3 protects and ranks by.

    num_sinks: tokens with position < num_sinks are protected; -1 protects the whole prompt.
    num_recent: the newest num_recent positions are protected, the token being written included.
    by_score: rank the others by score, else by position (a sliding window).
    pinned_columns: bit c protects every image token of grid column c.
    age_quota: the older and the newer half of the others are evicted in equal numbers.
    """

    num_sinks: int
    num_recent: int
    by_score: bool
    pinned_columns: int = 0
    age_quota: bool = field(default=False, metadata=ABSENT_BY_DEFAULT)

    @property
    def num_pinned_columns(self) -> int:
        """Number of grid columns whose tokens are protected."""
        return self.pinned_columns.bit_count()

    def num_protected(self, prompt_slots: int, grid: Grid) -> int:
        """The most tokens that this rule can protect at an eviction: R9's left side without
        evict_every.
        """
        sinks = prompt_slots if self.num_sinks < 0 else self.num_sinks
        return sinks + max(self.num_recent - 1, 0) + grid.height * self.num_pinned_columns


KEEP = Rule(-1, 0, False)  # of heads that are never full; any rule would do
FULL = "full"  # the policy under which all are


class HeadOption(NamedTuple):
    """One way to serve a KV head: its rule, its image slots (buffer included), how many an eviction
    frees.
    """

    rule: Rule
    image_slots: int
    evict_every: int


@dataclass(frozen=True)
class HeadGroup:
    """Neighboring KV heads of a layer with one rule and one tensor; num_slots includes the prompt
    slots.
    """

    rule: Rule
    num_slots: int
    evict_every: int
    num_heads: int

    def can_fill(self, prompt_slots: int, grid: Grid) -> bool:
        """Whether an image can take every slot, so that evictions happen at all (R9's second case
        is when not).
        """
        return self.num_slots < prompt_slots + grid.num_tokens


class GroupPolicy(NamedTuple):
    """A head group with the numbers of its table that its decode step needs."""

    group: HeadGroup
    score_decay: float
    grid_width: int


def pinned_bits(pinned_columns: int) -> int:
    """The mask as kernels and graphs take it, an int32: bit 31 is its sign."""
    return pinned_columns - (1 << 32) if pinned_columns >> 31 else pinned_columns


@dataclass(frozen=True)
class PolicyTable:
    """Rules and slots of every head of a model, by layer and head group.

    grid: of the model's image tokens.
    layers: 1 to 3 groups a layer, none of them empty.
    head_order: for each layer, the original KV head at each place after the heads were permuted by
    group.
    notes: what make_policy chose differently from its usual defaults, one sentence each, for the
    user.
    kv_dtype: model, or int8: keys and values as cache/quantized_rows.py stores them.
    lookahead: tokens between two steps before which heads evict; every head's image slots and
    evict_every are multiples of it. None where they need not be.
    """

    name: str
    budget: float
    prompt_slots: int
    score_decay: float
    grid: Grid
    layers: tuple[tuple[HeadGroup, ...], ...]
    head_order: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    kv_dtype: str = "model"
    lookahead: int | None = field(default=None, metadata=ABSENT_BY_DEFAULT)

    def groups(self) -> Iterator[HeadGroup]:
        """Every head group, layer by layer."""
        return (group for layer in self.layers for group in layer)

    def of_group(self, group: HeadGroup) -> GroupPolicy:
        """The policy of one of the table's groups."""
        return GroupPolicy(group, self.score_decay, self.grid.width)

    def option(self, group: HeadGroup) -> HeadOption:
        """The option by which a group serves each of its heads."""
        return HeadOption(group.rule, group.num_slots - self.prompt_slots, group.evict_every)

    @property
    def full_slots(self) -> int:
        """Slots that hold the longest prompt and every image token: nothing is ever evicted."""
        return self.prompt_slots + self.grid.num_tokens

    @property
    def image_slots_mean(self) -> float:
        """Image slots of the average KV head, buffer included."""
        slots = sum(group.num_heads * self.option(group).image_slots for group in self.groups())
        return slots / sum(group.num_heads for group in self.groups())

    @property
    def budget_in_force(self) -> float:
        """The budget that the table's slots amount to."""
        return self.image_slots_mean / self.grid.num_tokens

    def cache_bytes(self, config: ModelConfig, dtype_bytes: int, rows: int) -> int:
        """Bytes of keys, values (and their scales), positions and, where a group ranks by it,
        score; prompt slots included."""
        return sum(
            rows * group.num_heads * group.num_slots * self._slot_bytes(group, config, dtype_bytes)
            for group in self.groups()
        )

    def image_cache_bytes(self, config: ModelConfig, dtype_bytes: int, rows: int) -> int:
        """cache_bytes of the image slots alone: what a budget is about."""
        return sum(
            rows
            * group.num_heads
            * self.option(group).image_slots
            * self._slot_bytes(group, config, dtype_bytes)
            for group in self.groups()
        )

    def full_cache_bytes(self, config: ModelConfig, dtype_bytes: int, rows: int) -> int:
        """Keys and values alone of a cache of the prompt slots and all image tokens: what the
        saving is measured by.
        """
        return self.full_slots * self._full_token_bytes(config, dtype_bytes, rows)

    def full_image_cache_bytes(self, config: ModelConfig, dtype_bytes: int, rows: int) -> int:
        """full_cache_bytes of the image tokens alone."""
        return self.grid.num_tokens * self._full_token_bytes(config, dtype_bytes, rows)

    def _slot_bytes(self, group: HeadGroup, config: ModelConfig, dtype_bytes: int) -> int:
        row = (
            config.head_dim * dtype_bytes
            if self.kv_dtype == "model"
            else config.head_dim + BYTES_ROW_SCALE
        )
        return 2 * row + BYTES_POSITION + BYTES_SCORE * group.rule.by_score

    def _full_token_bytes(self, config: ModelConfig, dtype_bytes: int, rows: int) -> int:
        return rows * config.num_layers * config.num_kv_heads * 2 * config.head_dim * dtype_bytes

    def full(self) -> PolicyTable:
        """The table that keeps everything, with the heads in the same order."""
        layers = tuple(
            (HeadGroup(KEEP, self.full_slots, 1, sum(group.num_heads for group in groups)),)
            for groups in self.layers
        )
        full = replace(
            self, name=FULL, budget=1.0, score_decay=1.0, layers=layers, notes=(), lookahead=None
        )
        return full.validate()

    def validate(self) -> PolicyTable:
        """Returns the table if every head obeys R9 and the numbers fit together. Raises: UserError
        with the fix.
        """
        if not 0 <= self.score_decay <= 1:
            raise UserError(
                f"score_decay={self.score_decay} is outside [0, 1]; use 1 for the running sum, 0 "
                "for what came since the last eviction"
            )
        check_kv_dtype(self.kv_dtype)
        if self.prompt_slots < 1:
            raise UserError(f"prompt_slots={self.prompt_slots} holds no prompt; use 64")
        if not self.layers or len(self.layers) != len(self.head_order):
            raise UserError(
                f"the policy table has {len(self.layers)} layers and {len(self.head_order)} head "
                "orders; export again"
            )
        for index, (groups, order) in enumerate(zip(self.layers, self.head_order)):
            if sorted(order) != list(range(sum(group.num_heads for group in groups))):
                raise UserError(
                    f"layer {index}: the head order is not a permutation of the heads of its "
                    "groups; export again"
                )
            for group in groups:
                check_group(group, self.prompt_slots, self.grid, f"layer {index}")
                self._check_lookahead(group, f"layer {index}")
        return self

    def _check_lookahead(self, group: HeadGroup, where: str) -> None:
        """Raises UserError for a group that evicts between the steps that lookahead counts on."""
        if self.lookahead is None or not group.can_fill(self.prompt_slots, self.grid):
            return
        image_slots = group.num_slots - self.prompt_slots
        if image_slots % self.lookahead or group.evict_every % self.lookahead:
            raise UserError(
                f"{where}: {image_slots} image slots and evict_every={group.evict_every} are not"
                f" multiples of lookahead={self.lookahead}; export again"
            )

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data for JSON."""
        return plain(self)


def check_group(group: HeadGroup, prompt_slots: int, grid: Grid, where: str = "head group") -> None:
    """Returns if the group obeys R9 and holds the prompt. Raises: UserError with the least slots
    that do.
    """
    rule = group.rule
    if rule.pinned_columns >> MAX_PINNED_COLUMNS:
        raise UserError(
            f"{where}: a grid of {grid} is too wide to pin columns from {MAX_PINNED_COLUMNS} on;"
            " use a policy that pins none, such as ssd-row"
        )
    if rule.num_sinks < -1 or rule.num_recent < 0 or not 0 <= rule.pinned_columns < 1 << grid.width:
        raise UserError(
            f"{where}: {rule} is out of range; use num_sinks >= -1, num_recent >= 0 and a "
            f"pinned_columns mask of {grid.width} bits"
        )
    if group.num_heads < 1 or group.evict_every < 1:
        raise UserError(
            f"{where}: num_heads={group.num_heads} and evict_every={group.evict_every} must be "
            "at least 1; leave empty groups out"
        )
    if not group.can_fill(prompt_slots, grid):
        return
    image_slots = group.num_slots - prompt_slots
    if image_slots < 1:
        raise UserError(
            f"{where}: {group.num_slots} slots leave none for image tokens beside {prompt_slots} "
            "prompt slots; use a larger budget"
        )
    protected = rule.num_protected(prompt_slots, grid)
    least = protected + group.evict_every
    if group.num_slots < least:
        sinks = "the prompt" if rule.num_sinks < 0 else f"{rule.num_sinks} sinks"
        raise UserError(
            f"{where}: {sinks} + {max(rule.num_recent - 1, 0)} recent + {rule.num_pinned_columns}"
            f" pinned columns protect {protected} of {group.num_slots} slots, and"
            f" evict_every={group.evict_every} must fit beside them; use image slots >="
            f" {least - prompt_slots} (now {image_slots}; a larger budget gives more), a smaller"
            " num_recent or a smaller evict_every"
        )


def check_kv_dtype(kv_dtype: str) -> None:
    """Raises UserError for a format that caches are not stored in."""
    if kv_dtype == "fp8":
        raise UserError(
            "--kv-dtype fp8 is not offered: no ONNX operator that runtimes have writes a row into a"
            " float8 cache; use --kv-dtype int8, as many bytes and a quarter of the error"
        )
    if kv_dtype not in KV_DTYPES:
        raise UserError(f"unknown --kv-dtype {kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
