"""The checkpoint that a bundle was made from, of as many layers as the bundle has."""

from __future__ import annotations

from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.find import model_folder


def checkpoint_like(bundle: Bundle, model: str, lora: Path | None = None) -> Checkpoint:
    """The checkpoint of that name; its first layers alone where the bundle has fewer.

    Args: lora: the adapter that was merged into the bundle.
    Raises: UserError.
    """
    checkpoint, num_layers = (
        open_checkpoint(model_folder(model)[1], lora),
        bundle.config.model.num_layers,
    )
    return (
        checkpoint.first_layers(num_layers)
        if num_layers < checkpoint.config.num_layers
        else checkpoint
    )


def is_of(checkpoint: Checkpoint, bundle: Bundle) -> bool:
    """Whether the bundle was made from the checkpoint."""
    return checkpoint.fingerprint() == bundle.config.model_fingerprint


def checked(checkpoint: Checkpoint, bundle: Bundle) -> Checkpoint:
    """The checkpoint. Raises: UserError if the bundle was made from another one."""
    if is_of(checkpoint, bundle):
        return checkpoint
    wanted = bundle.config.model_fingerprint
    raise UserError(
        f"the bundle was made from another checkpoint (fingerprint {wanted[:12]}) than"
        f" {checkpoint.path} ({checkpoint.fingerprint()[:12]}); give its --model,"
        " the adapter that was merged into it with --lora, or export again"
    )
