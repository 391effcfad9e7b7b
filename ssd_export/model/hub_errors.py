"""Errors of a model hub, or of something on the way to it, as one line with a way out."""

from __future__ import annotations

from ssd_export.errors import UserError, first_line
from ssd_export.os_errors import os_error

UNREACHABLE = {
    "OfflineModeIsEnabled",
    "ConnectError",  # httpx
    "NetworkError",
    "RemoteProtocolError",
    "TimeoutException",
    "ConnectionError",  # requests and Python's own
    "Timeout",
    "TimeoutError",
    "gaierror",
}
STATUS_WAYS_OUT = {
    401: "run `hf auth login`",
    403: "run `hf auth login` with an account that may read it",
    429: "wait, or run `hf auth login` for a larger allowance",
}


def is_offline(error: BaseException) -> bool:
    """Whether the hub could not be reached at all: no name, no route, no answer, HF_HUB_OFFLINE.

    A proxy or a certificate that refuses is none of these, nor is any answer of the hub. Names, not
    classes: the hub's library has had three HTTP clients, each with its own.
    """
    chain: list[BaseException] = []
    todo: BaseException | None = error
    while todo is not None and todo not in chain:
        chain.append(todo)
        todo = todo.__cause__ or todo.__context__
    names = {kind.__name__ for part in chain for kind in type(part).__mro__}
    if names & {"SSLError", "ProxyError"} or hasattr(error, "server_message"):
        return False
    return bool(names & UNREACHABLE)


def refused(hub_id: str, revision: str | None, error: Exception) -> UserError:
    """The one line for what the hub, or something on the way to it, says."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{hub_id} has no revision {revision}; leave out --revision for the newest, or give a"
            " branch, tag or commit that the model's page lists under Files, History"
        )
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{hub_id} needs a permission: accept its terms on the model's page, run `hf auth"
            " login`, then try again"
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return UserError(
            f"the hub has no model {hub_id}; check the name, for example"
            " deepseek-community/Janus-Pro-1B, or give a folder as --model"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    names = {kind.__name__ for kind in type(error).__mro__}
    reason = reason_of(error)
    if isinstance(status, int):
        way_out = STATUS_WAYS_OUT.get(status, "try again later")
        return UserError(
            f"{constants.ENDPOINT} answers {status} for {hub_id} ({reason}): {way_out}, or set"
            " HF_HUB_OFFLINE=1 for the copy of an earlier download"
        )
    if "SSLError" in names or "certificate" in reason.lower():
        return UserError(
            f"the certificate of {constants.ENDPOINT} is not trusted here ({reason}): set"
            " SSL_CERT_FILE to the certificates of your network"
        )
    if "ProxyError" in names:
        return UserError(f"the proxy refuses ({reason}): check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, OSError) and error.errno:
        return os_error(error, "download to", constants.HF_HUB_CACHE)
    return UserError(
        f"could not download {hub_id} ({type(error).__name__}: {reason}); download it with `hf"
        f" download {hub_id} --local-dir DIR` and give DIR as --model"
    )


def reason_of(error: BaseException) -> str:
    """One short line of an error, whatever the hub's library says."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return first_line(error)
