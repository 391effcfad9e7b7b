"""The measurements asked of bench, checked before any work; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.extras import fix
from ssd_export.policy.table import FULL
from ssd_export.runtime.runners import DEFAULT, KINDS, check_threads, find_runner
from ssd_export.sampling import as_count

TRANSFORMERS = "transformers"
NO_TRANSFORMERS = (
    "the transformers baseline needs transformers 5.3 or newer:"
    f" {fix('bench')}, or use --baselines full"
)
MAX_BATCH = 4096  # images at once: more fills no GPU better
MAX_ROUNDS = 1000  # of whole batches: the median of more says nothing else
BASELINES = (TRANSFORMERS, FULL)


@dataclass(frozen=True)
class BenchSpec:
    """threads None: one for a model with short steps, else every core. model None: the demo's, for
    its bundles. rounds: whole batches of each cache to time, in turns; 0 none, None as many as a
    small model has time for. lookahead: what whole images, a round at least,
    are generated with beside single steps.
    """

    bundles: tuple[Path, ...]
    runner: str = DEFAULT
    provider: str | None = None
    batches: tuple[int, ...] = (1,)
    baselines: tuple[str, ...] = BASELINES
    steps: int = 96
    threads: int | None = None
    model: str | None = None
    profile: bool = False
    rounds: int | None = None
    lookahead: tuple[int | str, ...] = ()


def check_spec(spec: BenchSpec) -> BenchSpec:
    """Returns the spec if it can be run. Raises: UserError."""
    unknown = [name for name in spec.baselines if name not in BASELINES]
    if unknown:
        raise UserError(
            f"--baselines: unknown baseline {unknown[0]!r}; choose from {','.join(BASELINES)}, or"
            " none for no baseline"
        )
    if TRANSFORMERS in spec.baselines and find_spec("transformers") is None:
        raise UserError(NO_TRANSFORMERS)
    kind = find_runner(spec.runner)
    check_threads(spec.threads, "--threads")
    if not spec.batches:
        raise UserError("--batch (none) generates nothing; use 1,8,32")
    for batch in spec.batches:
        as_count(batch, "--batch", way_out="use 1,8,32", most=MAX_BATCH)
    if spec.rounds is not None:
        as_count(spec.rounds, "--rounds", 0, "use 7, or 0 for no whole images", MAX_ROUNDS)
    if spec.lookahead and spec.rounds == 0:
        raise UserError(
            "--lookahead is measured with whole images, and --rounds 0 generates none; use 7"
        )
    if spec.steps < 1:
        raise UserError(f"--steps {spec.steps} times nothing; use 96")
    if spec.profile and not kind.profiles_operators:
        able = " or ".join(other.name for other in KINDS if other.profiles_operators)
        raise UserError(
            f"--profile asks the runner, and {kind.name} cannot say; use --runner {able}"
        )
    return replace(spec, provider=kind.provider(spec.provider))
