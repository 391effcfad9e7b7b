"""One table of cache cases for every backend of decode attention.

A backend that runs `inputs(case)` must hold the oracle's positions exactly after every step, and
outputs and scores within the tolerance (`op`) of its dtype. Inputs are multiples of 1/32 below 4,
so float32, float16 and bfloat16 hold them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from ssd_export.config import Grid
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from ssd_export.verify.tolerances import TOLERANCES
from tests.oracle import OracleHead


@dataclass(frozen=True)
class Case:
    """One head group over a prefill and some decode steps. num_slots includes prompt_slots."""

    name: str
    rule: Rule
    num_slots: int
    evict_every: int = 1
    score_decay: float = 1.0
    num_heads: int = 2
    query_group_size: int = 1
    head_dim: int = 8
    prompt_slots: int = 5
    prompt_lengths: tuple[int, ...] = (5, 3)
    steps: int = 40
    seed: int = 0
    kv_dtype: str = "model"
    grid_width: int = 24

    @property
    def grid(self) -> Grid:
        return Grid(self.grid_width, self.grid_width)

    @property
    def group(self) -> HeadGroup:
        return HeadGroup(self.rule, self.num_slots, self.evict_every, self.num_heads)

    @property
    def policy(self) -> GroupPolicy:
        return GroupPolicy(self.group, self.score_decay, self.grid_width)

    @property
    def rows(self) -> int:
        return len(self.prompt_lengths)


WINDOW, SCORED, GUARDED = Rule(-1, 0, False), Rule(-1, 0, True), Rule(-1, 6, True)
QUOTA = replace(GUARDED, age_quota=True)

CASES = (
    Case("full", WINDOW, 5 + 576),
    Case("full-gqa", WINDOW, 5 + 576, query_group_size=2, seed=1),
    Case("window-ring", WINDOW, 16, seed=2),
    Case("window-25-holds-the-token-above", WINDOW, 5 + 25, steps=60, seed=3),
    Case("window-4-sinks", Rule(4, 0, False), 17, seed=4),
    Case("window-no-sinks", Rule(0, 0, False), 13, seed=5),
    Case("window-every-6", WINDOW, 19, 6, seed=6),
    Case("window-every-24", WINDOW, 5 + 31, 24, steps=80, seed=7),
    Case("scored-no-guard", SCORED, 16, seed=8),
    Case("scored-gqa-2", GUARDED, 19, query_group_size=2, seed=9),
    Case("scored-gqa-3", GUARDED, 19, query_group_size=3, num_heads=1, seed=10),
    Case("scored-mqa-4", GUARDED, 21, 6, query_group_size=4, num_heads=1, seed=11),
    Case("scored-every-6", GUARDED, 23, 6, seed=12),
    Case("scored-every-24", GUARDED, 5 + 48, 24, steps=110, seed=13),
    Case("h2o-letter", Rule(0, 8, True), 17, seed=14),
    Case("h2o-4-sinks-every-6", Rule(4, 8, True), 22, 6, seed=15),
    Case("tova", SCORED, 16, score_decay=0.0, seed=75),
    Case("linear-row-buffer", Rule(-1, 12, True), 5 + 48, 24, score_decay=0.0, steps=110, seed=100),
    Case("decay-0.9", GUARDED, 21, 6, score_decay=0.9, steps=60, seed=18),
    Case(
        "margin-columns",
        Rule(-1, 0, False, 1 | 1 << 22 | 1 << 23),
        5 + 72 + 6,
        6,
        steps=110,
        seed=19,
    ),
    Case("pinned-and-scored", Rule(-1, 3, True, 1 << 5), 5 + 24 + 7, 1, steps=110, seed=20),
    Case("boundary-prompt-and-buffer", SCORED, 5 + 1, 1, seed=21),
    Case("boundary-recent", Rule(-1, 9, True), 5 + 8 + 6, 6, seed=22),
    Case("boundary-everything-leaves", Rule(0, 0, True), 6, 6, seed=23),
    Case("boundary-pinned", Rule(-1, 0, True, 1 << 3), 5 + 24 + 1, 1, steps=130, seed=24),
    Case(
        "one-head-one-row-size-one",
        GUARDED,
        15,
        num_heads=1,
        head_dim=1,
        prompt_lengths=(5,),
        seed=25,
    ),
    Case(
        "odd-sizes",
        Rule(3, 5, True),
        29,
        7,
        num_heads=5,
        head_dim=3,
        prompt_slots=11,
        prompt_lengths=(11, 1, 7),
        seed=26,
    ),
    Case(
        "head-dim-19",
        GUARDED,
        20,
        3,
        num_heads=3,
        head_dim=19,
        prompt_lengths=(4, 5, 1, 2),
        seed=101,
    ),
    Case("head-dim-64", GUARDED, 33, 6, num_heads=1, head_dim=64, prompt_lengths=(5, 5), seed=28),
    Case(
        "short-prompts",
        GUARDED,
        41,
        6,
        prompt_slots=20,
        prompt_lengths=(1, 20, 2, 19),
        steps=60,
        seed=29,
    ),
    Case(
        "grid-16-margin-columns",
        Rule(-1, 3, True, 1 | 1 << 14 | 1 << 15),
        5 + 2 + 48 + 16,
        16,
        steps=110,
        seed=31,
        grid_width=16,
    ),
    Case(
        "grid-32-last-column",
        Rule(-1, 0, True, 1 | 1 << 31),
        5 + 64 + 8,
        8,
        steps=110,
        seed=32,
        grid_width=32,
    ),
    Case("headkv", QUOTA, 23, 6, steps=70, seed=33),
    Case("headkv-row-buffer", Rule(-1, 12, True, age_quota=True), 5 + 60, 24, steps=130, seed=34),
    Case("headkv-gqa-one-at-a-time", QUOTA, 19, query_group_size=2, steps=60, seed=35),
    Case("headkv-odd-buffer-no-sinks", Rule(0, 4, True, age_quota=True), 18, 5, steps=60, seed=36),
    Case("headkv-decay-0", QUOTA, 25, 7, score_decay=0.0, steps=70, seed=37),
    Case("age-quota-by-position", Rule(-1, 3, False, age_quota=True), 21, 3, steps=60, seed=38),
    Case(
        "age-quota-pinned-and-one-at-a-time",
        Rule(-1, 3, True, 1 << 5, age_quota=True),
        5 + 24 + 7,
        steps=110,
        seed=39,
    ),
    Case("age-quota-ring", Rule(-1, 0, False, age_quota=True), 16, steps=60, seed=40),
    Case("boundary-age-quota", Rule(-1, 9, True, age_quota=True), 5 + 8 + 5, 5, seed=41),
    Case("99-slots", Rule(-1, 20, True), 99, 6, num_heads=1, steps=111, seed=30),
)


INT8_CASES = tuple(replace(case, name=f"{case.name}-int8", kv_dtype="int8") for case in CASES)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, float32. Step t of row b is position prompt_length[b] + t.

    prompt_query [B, H*G, P, D], prompt_key and prompt_value [B, H, P, D], query [steps, B, H*G, D],
    key and value [steps, B, H, D], prompt_length int32 [B].
    """

    prompt_query: np.ndarray
    prompt_key: np.ndarray
    prompt_value: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    prompt_length: np.ndarray


def inputs(case: Case) -> Inputs:
    """The tensors of a case, the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(case.seed))

    def draw(*shape: int) -> np.ndarray:
        return (generator.integers(-64, 65, shape) / 32).astype(np.float32)

    heads, queries, dim = case.num_heads, case.num_heads * case.query_group_size, case.head_dim
    prompt = [draw(case.rows, count, case.prompt_slots, dim) for count in (queries, heads, heads)]
    decode = [draw(case.steps, case.rows, count, dim) for count in (queries, heads, heads)]
    return Inputs(*prompt, *decode, np.array(case.prompt_lengths, dtype=np.int32))


@dataclass(frozen=True)
class Expected:
    """What the oracle holds and gives: after prefill (index 0 of position and score) and after
    every step.

    position int32 and score float64 [1 + steps, B, H, S], out float64 [steps, B, H*G, D];
    prompt_out is a list [B][H*G] of arrays [length, D]; smallest_gap between a retention kept and
    one evicted; num_evictions of all heads.
    """

    position: np.ndarray
    score: np.ndarray
    out: np.ndarray
    prompt_out: list[list[np.ndarray]]
    smallest_gap: float
    num_evictions: int


@lru_cache(maxsize=256)
def expected(case: Case) -> Expected:
    """The oracle's run of a case, head by head."""
    data, size = inputs(case), case.query_group_size
    position = np.zeros((1 + case.steps, case.rows, case.num_heads, case.num_slots), np.int32)
    score = np.zeros(position.shape)
    out = np.zeros(data.query.shape)
    prompt_out: list[list[np.ndarray]] = [[] for _ in range(case.rows)]
    heads = []
    for row, length in enumerate(case.prompt_lengths):
        for head in range(case.num_heads):
            oracle = OracleHead(
                case.rule,
                case.num_slots,
                case.evict_every,
                case.score_decay,
                length,
                case.grid_width,
            )
            members = slice(head * size, (head + 1) * size)
            prompt = oracle.prefill(
                data.prompt_query[row, members].tolist(),
                data.prompt_key[row, head].tolist(),
                data.prompt_value[row, head].tolist(),
            )
            prompt_out[row] += [np.array(member) for member in prompt]
            for held in oracle.slots[:length]:
                held.key, held.value = as_stored(case, held.key), as_stored(case, held.value)
            position[0, row, head], score[0, row, head] = oracle.positions, oracle.scores
            for step in range(case.steps):
                out[step, row, members] = oracle.step(
                    data.query[step, row, members].tolist(),
                    as_stored(case, data.key[step, row, head].tolist()),
                    as_stored(case, data.value[step, row, head].tolist()),
                    length + step,
                )
                position[step + 1, row, head], score[step + 1, row, head] = (
                    oracle.positions,
                    oracle.scores,
                )
            heads.append(oracle)
    return Expected(
        position,
        score,
        out,
        prompt_out,
        min(head.smallest_gap for head in heads),
        sum(head.num_evictions for head in heads),
    )


def as_stored(case: Case, row: list[float]) -> list[float]:
    """A key or value as a cache of the case's kv_dtype gives it back; float32 where rounding
    decides.
    """
    if case.kv_dtype == "model":
        return row
    greatest = np.abs(np.float32(row)).max()
    codes = (
        np.rint(np.float32(row) * (np.float32(127) / greatest)) if greatest else np.zeros(len(row))
    )
    return (codes.astype(np.float64) * float(greatest) / 127).tolist()


class Backend(Protocol):
    """What is under test: prefill and step each return numpy arrays of the state they leave."""

    def prefill(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Position and score [B, H, S]."""

    def step(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Out [B, H*G, D], position and score [B, H, S]; score is not read where the rule ignores
        it.
        """


def assert_matches_oracle(case: Case, backend: Backend, dtype: str = "float32") -> None:
    """Returns if the backend holds the oracle's tokens slot for slot and its numbers within
    tolerance.
    """
    wanted, tolerance = expected(case), TOLERANCES[dtype].op

    def compare(moment: int, position: np.ndarray, score: np.ndarray | None) -> None:
        np.testing.assert_array_equal(
            position, wanted.position[moment], f"{case.name}, step {moment}"
        )
        if case.rule.by_score:
            held = position >= 0
            np.testing.assert_allclose(
                score[held], wanted.score[moment][held], tolerance, tolerance
            )

    compare(0, *backend.prefill())
    for index in range(case.steps):
        out, position, score = backend.step(index)
        compare(index + 1, position, score)
        np.testing.assert_allclose(out, wanted.out[index], tolerance, tolerance)
