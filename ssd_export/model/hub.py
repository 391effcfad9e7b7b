"""Checkpoints from a model hub: fetched with resume into the hub's own cache, at a commit that is
written down.

The address is huggingface.co, or what HF_ENDPOINT says. Of the files only those that are needed
come: JSON files, and the weights in one format (safetensors where the repository has them).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.model.hub_errors import is_offline, reason_of, refused
from ssd_export.model.weight_files import INDEXES, SINGLES, shard_names
from ssd_export.os_errors import is_file, os_error

BROKE_OFF = (
    "the download of {} broke off ({}): run the same command again, it goes on where it stopped"
)
log = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubModel:
    """A downloaded checkpoint. revision: the commit's full hash, whatever branch or tag was asked
    for.
    """

    folder: Path
    revision: str


def is_hub_id(model: str) -> bool:
    """Whether it reads as owner/name."""
    return bool(HUB_ID.fullmatch(model)) and not model.endswith((".json", ".bin", ".safetensors"))


def fetch(hub_id: str, revision: str | None = None) -> HubModel:
    """The model's folder in the hub's cache; what an earlier call left unfinished is continued.

    Without a network it is the copy of an earlier download, as the hub's own library finds it: of
    the commit that the branch or tag meant then. Which commit, and that it came from the cache, is
    logged.
    Raises: UserError, one line that says how to get the files by hand, without a network and a
    copy, for an unknown model or revision, one that needs a permission, or a full disk.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    except Exception as error:
        if is_offline(error):
            return _from_cache(hub_id, revision, error)
        raise refused(hub_id, revision, error) from error
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}
    wanted = wanted_files(sizes)
    _check_disk(hub_id, info.sha or "", {name: sizes[name] for name in wanted})
    log.info("%s: commit %s%s", hub_id, info.sha, f" ({revision})" if revision else "")
    try:
        # by branch or tag: the library then notes which commit it meant, for when it is offline
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:
        if is_offline(error):
            raise UserError(BROKE_OFF.format(hub_id, reason_of(error))) from error
        raise refused(hub_id, revision, error) from error
    if folder.name != info.sha:
        raise UserError(BROKE_OFF.format(hub_id, f"it is now at commit {folder.name}"))
    return HubModel(folder, info.sha)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Files of a repository that a checkpoint is read from."""
    names = [name for name in names if "/" not in name]
    safetensors = [name for name in names if name.endswith(".safetensors")]
    weights = safetensors or [name for name in names if name.endswith(".bin")]
    return sorted(weights + [name for name in names if name.endswith(".json")])


def _check_disk(hub_id: str, revision: str, sizes: dict[str, int]) -> None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    from ssd_export.machine import check_disk

    needed = sum(
        size
        for name, size in sizes.items()
        if not try_to_load_from_cache(hub_id, name, revision=revision)
    )
    check_disk(
        Path(HF_HUB_CACHE),
        needed,
        f"downloading {hub_id}",
        "set HF_HOME to a folder on a larger disk, or free some",
    )


def _from_cache(hub_id: str, revision: str | None, error: Exception) -> HubModel:
    """The copy of an earlier download. Raises: UserError where there is none, or a part of one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    asked = f"{hub_id} at {revision}" if revision else hub_id
    reason = reason_of(error)
    by_hand = (
        f"on a machine with a network run `hf download {hub_id}"
        + (f" --revision {revision}" if revision else "")
        + " --local-dir DIR`, copy DIR here and give it as --model"
    )
    try:
        path = snapshot_download(
            hub_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"{asked} is not in the cache {HF_HUB_CACHE}, and the hub cannot be reached ({reason}):"
            f" {by_hand}"
        ) from error
    except OSError as unreadable:
        raise os_error(unreadable, "read", HF_HUB_CACHE) from unreadable
    folder = Path(path)
    lacking = missing_file(folder)
    if lacking:
        raise UserError(
            f"the copy of {asked} in the cache, commit {folder.name}, lacks {lacking}: its download"
            f" was interrupted, and the hub cannot be reached now ({reason}); {by_hand}"
        ) from error
    log.info(
        "%s: commit %s%s, from the cache: the hub cannot be reached (%s)",
        hub_id,
        folder.name,
        f" ({revision})" if revision else " (main when it was downloaded)",
        reason,
    )
    return HubModel(folder, folder.name)


def missing_file(folder: Path) -> str:
    """The first file that a checkpoint's folder lacks, "" where it is whole."""
    for name in ("config.json", "tokenizer.json"):
        if not is_file(folder / name):
            return name
    for single, index in zip(SINGLES, INDEXES):
        if is_file(folder / single):
            return ""
        if is_file(folder / index):
            shards = shard_names(folder / index)
            return next((name for name in shards if not is_file(folder / name)), "")
    return "its weights"
