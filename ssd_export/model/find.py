"""The checkpoint that --model means: a built-in demo, a folder, or a hub's owner/name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.model.hub import fetch, is_hub_id
from ssd_export.os_errors import check_utf8, is_folder

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_CHECKPOINT, CLASS_DEMO_CHECKPOINT = (
    DEMO_FOLDER / "checkpoint",
    DEMO_FOLDER / "class_checkpoint",
)
DEMO, CLASS_DEMO = "demo", "demo-classes"
DEMOS = {DEMO: DEMO_CHECKPOINT, CLASS_DEMO: CLASS_DEMO_CHECKPOINT}  # by the name of their bundles
TRAINED_BY = {DEMO: "train-demo", CLASS_DEMO: "train-demo --classes"}


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
    """The checkpoint of a built-in demo, a folder, or a hub's owner/name; the last is downloaded.

    Raises: UserError where there is none, or --revision is given for one that has none.
    """
    folder = local_folder(model)
    is_local = model in DEMOS or is_folder(folder)
    if revision is not None and is_local:
        raise UserError(
            f"--revision is for models of a hub and {model} is a local one; leave it out"
        )
    if model in DEMOS:
        if not (DEMOS[model] / "config.json").is_file():
            raise UserError(
                f"the checkpoint {model} is missing from this installation ({DEMOS[model]});"
                f" install ssd-export again, or make it with `ssd-export {TRAINED_BY[model]}` and"
                " give --model demo-training/checkpoint"
            )
        return Model(model, DEMOS[model])
    if is_local:
        check_utf8(folder.resolve())
        return Model(folder.resolve().name.lower(), folder)
    if is_hub_id(model):
        found = fetch(model, revision)
        return Model(model.split("/")[1].lower(), found.folder, found.revision)
    raise UserError(
        f"no checkpoint at {model}: give a folder with config.json and the weights, a hub id such"
        f" as deepseek-community/Janus-Pro-1B, or {' or '.join(DEMOS)}"
    )
