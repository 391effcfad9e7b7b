"""The ladder of proofs for a bundle: from what its files promise, op by op, up to the image.

    contract     the graphs take and give what the policy table promises; every head is where the
                 head map says
    compression  slots, bytes and budget as allocated
    ops          attention functions and evict graph against the rules, step by step
    origin       tokenizer, shape and sampling defaults equal the checkpoint's (checkpoint only)
    weights      every tensor equals the checkpoint's (checkpoint only)
    layers       keys, values, positions, scores of every head over the first steps
    logits       all steps with the reference's tokens, slots exact; tokens evicted are counted
    tokens       generated alone from the same seed; the first ones with top-k, too
    image        pixels
    operators    the decode step with one operator a layer, where bundle and machine have it
    int8_decoder pixels of the int8 image decoder, where the bundle has one
The first rung that fails ends the climb: what stands above it cannot be right.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.export.source_checkpoint import checked, checkpoint_like, is_of
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.find import DEMOS
from ssd_export.runtime import runners
from ssd_export.runtime.finite import NotFiniteError
from ssd_export.runtime.ort_operators import has_fused_step
from ssd_export.runtime.runner import InspectableRunner
from ssd_export.typed_json import report_json
from ssd_export.verify.attention_op import check_ops
from ssd_export.verify.checkpoint_runner import checkpoint_runner
from ssd_export.verify.checks import Divergence, Rung
from ssd_export.verify.contract import check_contract, check_weights
from ssd_export.verify.generation import Ladder, Progress
from ssd_export.verify.int8_decoder import check_int8_decoder
from ssd_export.verify.operators import check_operators
from ssd_export.verify.origin import check_origin
from ssd_export.verify.spec import CHECKPOINT, LEVELS, VerifySpec, check_spec
from ssd_export.verify.tolerances import Tolerance, tolerance_of
from ssd_export.version import TOOL_VERSION

REPORT = "reports/verify.json"


def verify(
    spec: VerifySpec, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """The report: `ok`, the rungs in order, what was not run. Nothing is written.

    Raises: UserError for a bundle that does not open, an unknown reference or level, a checkpoint
    of another model.
    """
    check_spec(spec)
    bundle = open_bundle(spec.bundle)
    checkpoint = _checkpoint(bundle, spec)
    against = spec.against or (CHECKPOINT if checkpoint else "torch")
    subject = next(name for name in runners.NAMES if name != against)
    rungs, not_run = _climb(bundle, subject, against, checkpoint, spec, progress)
    return {
        "ok": all(rung.ok for rung in rungs),
        "bundle_hash": bundle.hash,
        "runner": subject,
        "against": against,
        "level": spec.level,
        "provider": provider_of(subject, spec.provider),
        "seed": spec.seed,
        "dtype": bundle.config.dtype,
        "policy": bundle.config.policy.name,
        "tolerances": asdict(_tolerance(bundle)),
        "tool_version": TOOL_VERSION,
        "machine": f"{platform.system()} {platform.machine()}",
        "rungs": [rung.to_dict() for rung in rungs],
        "not_run": not_run,
    }


def provider_of(name: str, asked: str | None) -> str:
    """The provider of a runner: as asked, but for one that has a single one."""
    kind = runners.find_runner(name)
    return asked if asked in kind.providers else kind.provider()


def open_exact(bundle: Bundle, name: str, spec: VerifySpec) -> InspectableRunner:
    """The runner of that name, rounding as the reference does."""
    provider = provider_of(name, spec.provider)
    return runners.open_runner(bundle, name, provider, spec.threads, exact=True)


def _tolerance(bundle: Bundle) -> Tolerance:
    return tolerance_of(bundle.config.dtype, bundle.config.policy.kv_dtype)


def add_report(bundle_path: Path, report: dict[str, Any]) -> Bundle:
    """Puts the report into the bundle as reports/verify.json. Raises: UserError if the bundle
    cannot be written.
    """
    return open_bundle(bundle_path).add_files({REPORT: (report_json(report) + "\n").encode()})


def _checkpoint(bundle: Bundle, spec: VerifySpec) -> Checkpoint | None:
    """The checkpoint the bundle was made from, where it is at hand."""
    if spec.against not in (None, "checkpoint"):
        return None
    if spec.model is None and bundle.config.model_name not in DEMOS:
        if spec.against == "checkpoint":
            raise UserError(
                f"--against checkpoint needs the checkpoint of {bundle.config.model_name}; give"
                " --model DIR"
            )
        return None
    checkpoint = checkpoint_like(bundle, spec.model or bundle.config.model_name, spec.lora)
    if spec.model is None and spec.against is None and not is_of(checkpoint, bundle):
        _check_other_demo(bundle, checkpoint)
        return None
    return checked(checkpoint, bundle)


def _check_other_demo(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raises UserError where a demo bundle has the weights of the demo of this version, and another
    fingerprint. Otherwise it is of another demo, which is not at hand to compare with.
    """
    if bundle.config.model == checkpoint.config and check_weights(bundle, checkpoint).ok:
        raise UserError(
            f"bundle {bundle.path} has the weights of {checkpoint.path}, whose fingerprint is"
            f" {checkpoint.fingerprint()[:12]}, and says {bundle.config.model_fingerprint[:12]}:"
            " export it again with --force"
        )


def _climb(
    bundle: Bundle,
    subject: str,
    against: str,
    checkpoint: Checkpoint | None,
    spec: VerifySpec,
    progress: Progress,
) -> tuple[list[Rung], list[str]]:
    """The rungs up to the level or the first failure, and the names of the others."""
    ladder: list[Ladder] = []

    def climb() -> Ladder:  # opened when first needed: a broken contract would not load
        if not ladder:
            reference: InspectableRunner = (
                checkpoint_runner(bundle, checkpoint, provider_of("torch", spec.provider))
                if checkpoint is not None and against == CHECKPOINT
                else open_exact(bundle, against, spec)
            )
            opened = open_exact(bundle, subject, spec)
            ladder.append(Ladder(bundle, opened, reference, spec.seed, progress))
        return ladder[0]

    steps: list[tuple[str, Callable[[], Rung]]] = [
        ("contract", lambda: check_contract(bundle)),
        ("compression", lambda: climb().compression()),
        ("ops", lambda: check_ops(bundle, provider_of(runners.DEFAULT, spec.provider))),
    ]
    if checkpoint is not None and against == "checkpoint" and spec.level != "ops":
        steps.append(("origin", lambda: check_origin(bundle, checkpoint)))
        steps.append(("weights", lambda: check_weights(bundle, checkpoint, progress)))
    levels = LEVELS[1 : LEVELS.index(spec.level) + 1]
    steps += [(level, partial(_climb_to, climb, level)) for level in levels]
    is_on_cpu = provider_of(runners.DEFAULT, spec.provider) == "cpu"
    if "logits" in levels and has_fused_step(bundle) and is_on_cpu:
        steps.append(("operators", lambda: check_operators(bundle, climb(), spec.threads)))
    if spec.level == LEVELS[-1] and bundle.config.int8_decoder is not None:
        steps.append(("int8_decoder", lambda: check_int8_decoder(bundle, climb(), spec.threads)))
    rungs: list[Rung] = []
    try:
        for name, run in steps:
            try:
                rungs.append(run())
            except NotFiniteError as error:
                rungs.append(Rung(name, {}, Divergence(str(error))))
            if not rungs[-1].ok:
                break
    finally:
        for runner in (runner for one in ladder for runner in (one.subject, one.reference)):
            runner.close()
    return rungs, [name for name, _ in steps[len(rungs) :]]


def _climb_to(climb: Callable[[], Ladder], level: str) -> Rung:
    return getattr(climb(), level)()
