"""The checkpoint that --model means: the built-in demo, a folder, or a hub's owner/name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.model.hub import fetch, is_hub_id
from ssd_export.os_errors import is_folder

DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"
DEMO = "demo"


@dataclass(frozen=True)
class Model:
    """A checkpoint as --model found it. name: short, for a bundle's folder; revision: the hub's
    commit, if it has one.
    """

    name: str
    folder: Path
    revision: str | None = None


def model_folder(model: str) -> tuple[str, Path]:
    """find_model's name and folder."""
    found = find_model(model)
    return found.name, found.folder


def local_folder(model: str) -> Path:
    """The path that --model is, if it is one; ~ is the home folder."""
    try:
        return Path(model).expanduser()
    except RuntimeError:  # a user that this system does not know
        return Path(model)


def find_model(model: str, revision: str | None = None) -> Model:
    """The checkpoint of the built-in demo, a folder, or a hub's owner/name; the last is downloaded.

    Raises: UserError where there is none, or --revision is given for one that has none.
    """
    folder = local_folder(model)
    is_local = model == DEMO or is_folder(folder)
    if revision is not None and is_local:
        raise UserError(
            f"--revision is for models of a hub and {model} is a local one; leave it out"
        )
    if model == DEMO:
        if not DEMO_CHECKPOINT.is_dir():
            raise UserError(
                f"the demo checkpoint is missing from this installation ({DEMO_CHECKPOINT});"
                " install ssd-export again"
            )
        return Model(DEMO, DEMO_CHECKPOINT)
    if is_local:
        return Model(folder.resolve().name.lower(), folder)
    if is_hub_id(model):
        found = fetch(model, revision)
        return Model(model.split("/")[1].lower(), found.folder, found.revision)
    raise UserError(
        f"no checkpoint at {model}: give a folder with config.json and the weights, a hub id such"
        " as deepseek-community/Janus-Pro-1B, or demo"
    )
