"""The comparison asked of verify, checked before any work; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.runtime.runners import DEFAULT, NAMES, check_threads, find_runner

LEVELS = ("ops", "layers", "logits", "tokens", "image")
CHECKPOINT = "checkpoint"  # beside the runners, a reference of verify alone
REFERENCES = (*NAMES, CHECKPOINT)


@dataclass(frozen=True)
class VerifySpec:
    """against None: checkpoint where it is at hand, else torch. model None: the demo's checkpoint
    if it is the bundle's. lora: the adapter that was merged into the bundle.
    """

    bundle: Path
    against: str | None = None
    level: str = "image"
    model: str | None = None
    provider: str | None = None
    threads: int | None = None
    seed: int = 0
    lora: Path | None = None


def check_spec(spec: VerifySpec) -> None:
    """Raises UserError for an unknown level, reference or provider, or threads that cannot help."""
    if spec.level not in LEVELS:
        raise UserError(f"unknown --level {spec.level!r}; choose one of {', '.join(LEVELS)}")
    if spec.against is not None and spec.against not in REFERENCES:
        raise UserError(
            f"unknown --against {spec.against!r}; choose one of {', '.join(REFERENCES)}"
        )
    if spec.lora is not None and spec.model is None:
        raise UserError("--lora is added to a checkpoint: give that, too, with --model")
    if spec.lora is not None and spec.against not in (None, CHECKPOINT):
        raise UserError(f"--lora is for --against {CHECKPOINT}, not {spec.against}; leave it out")
    find_runner(DEFAULT).provider(spec.provider)
    check_threads(spec.threads, "--threads")
