"""Checkpoints from a model hub: fetched with resume into the hub's own cache, at a commit that is
written down.

The address is huggingface.co, or what HF_ENDPOINT says. Of the files only those that are needed
come: JSON files, and the weights in one format (safetensors where the repository has them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError

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

    Raises: UserError, one line that says how to get the files by hand, without a network, for an
    unknown model or revision, one that needs a permission, or a full disk.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
        sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}
        wanted = wanted_files(sizes)
        _check_disk(hub_id, info.sha, {name: sizes[name] for name in wanted})
        return HubModel(
            Path(snapshot_download(hub_id, revision=info.sha, allow_patterns=wanted)), info.sha
        )
    except UserError:
        raise
    except RevisionNotFoundError as error:
        raise UserError(
            f"{hub_id} has no revision {revision}; leave out --revision for the newest, or give a"
            " branch, tag or commit that the model's page lists under Files, History"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} needs a permission: accept its terms on the model's page, run `hf auth"
            " login`, then try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {hub_id}; check the name, for example"
            " deepseek-community/Janus-Pro-1B, or give a folder as --model"
        ) from error
    except Exception as error:  # the library and what carries it raise a dozen more: no name, no route, no certificate
        return _from_cache(hub_id, revision, error)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that a checkpoint is read from."""
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
    """The copy of an earlier download: of that commit, or the newest. Raises: UserError where there
    is none.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    copies = [
        folder
        for folder in snapshots.glob(revision or "*")
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    ]
    if copies:
        newest = max(copies, key=lambda folder: folder.stat().st_mtime)
        return HubModel(newest, newest.name)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    raise UserError(
        f"could not download {hub_id} ({reason}); on a machine with a network run `hf download"
        f" {hub_id} --local-dir DIR`, copy DIR here and give it as --model"
    ) from error
