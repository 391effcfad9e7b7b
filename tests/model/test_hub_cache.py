"""The copy of an earlier download: the commit that the hub's own library would take, and only where
the hub cannot be reached.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, errors, snapshot_download

from ssd_export.errors import UserError
from ssd_export.model.hub import fetch
from ssd_export.model.hub_errors import is_offline

NAME = "me/Janus-Demo"
A, B, C = "a" * 40, "b" * 40, "c" * 40
WHOLE = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--me--Janus-Demo"


def snapshot(cache: Path, commit: str, *files: str, refs: tuple[str, ...] = ()) -> None:
    folder = cache / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    for ref in refs:
        (cache / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (cache / "refs" / ref).write_text(commit)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Makes the hub answer every question with an error."""

    def set_error(error: Exception) -> None:
        def model_info(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)

    return set_error


@pytest.fixture
def offline(answer: Callable[[Exception], None]) -> None:
    answer(errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co/..."))


@pytest.mark.parametrize("revision", [None, "main", "v1", A, "refs/pr/1", A[:7], B, "nowhere"])
def test_the_commit_is_the_one_that_the_hubs_library_takes(
    cache: Path, offline: None, revision: str | None
) -> None:
    snapshot(cache, A, *WHOLE, refs=("main", "v1"))
    snapshot(cache, B, *WHOLE)  # newer, and what no branch means
    try:
        theirs = Path(snapshot_download(NAME, revision=revision, local_files_only=True)).name
    except errors.LocalEntryNotFoundError:
        with pytest.raises(UserError, match=f"{NAME} at {revision} is not in the cache"):
            fetch(NAME, revision)
    else:
        assert fetch(NAME, revision).revision == theirs


def test_what_came_from_the_cache_is_said(
    cache: Path, offline: None, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot(cache, A, *WHOLE, refs=("main",))
    with caplog.at_level(logging.INFO, "ssd_export"):
        fetch(NAME)
    assert caplog.messages == [
        f"{NAME}: commit {A} (main when it was downloaded), from the cache: the hub cannot be"
        " reached (HF_HUB_OFFLINE is set)"
    ]


def test_an_interrupted_snapshot_hides_no_whole_one(cache: Path, offline: None) -> None:
    snapshot(cache, A, *WHOLE, refs=("main",))
    snapshot(cache, C, "config.json", "tokenizer.json", refs=("next",))
    assert fetch(NAME).revision == A
    with pytest.raises(UserError, match=f"commit {C}, lacks its weights: .*interrupted"):
        fetch(NAME, "next")


@pytest.mark.parametrize("lost", WHOLE)
def test_a_part_of_a_download_names_what_it_lacks(cache: Path, offline: None, lost: str) -> None:
    snapshot(cache, A, *(name for name in WHOLE if name != lost), refs=("main",))
    with pytest.raises(UserError, match="lacks|not in the cache"):
        fetch(NAME)


def test_shards_that_never_came_are_named(cache: Path, offline: None) -> None:
    snapshot(cache, A, "config.json", "tokenizer.json", refs=("main",))
    folder = cache / "snapshots" / A
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}'
    )
    (folder / "model-1.safetensors").write_text("")
    with pytest.raises(UserError, match="lacks model-2.safetensors"):
        fetch(NAME)


def request() -> httpx2.Request:
    return httpx2.Request("GET", "https://huggingface.co/api")


def http_error(status: int) -> Exception:
    response = httpx2.Response(status, request=request())
    return errors.HfHubHTTPError(f"{status} Server Error", response=response)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


NO_CERTIFICATE = ssl.SSLCertVerificationError("certificate verify failed: self-signed")
OFFLINE = [
    errors.OfflineModeIsEnabled("offline"),
    httpx2.ConnectError("no route"),
    httpx2.ConnectTimeout("no answer"),
    httpx2.ReadTimeout("no answer"),
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    caused(RuntimeError("wrapped"), socket.gaierror(-2, "Name or service not known")),
]
NOT_OFFLINE = [
    (caused(httpx2.ConnectError("TLS failed"), NO_CERTIFICATE), ["TLS failed"]),
    (NO_CERTIFICATE, ["certificate", "SSL_CERT_FILE"]),
    (httpx2.ProxyError("407 Proxy Authentication Required"), ["proxy", "HTTPS_PROXY"]),
    (http_error(503), ["answers 503", "try again later", "HF_HUB_OFFLINE=1"]),
    (http_error(429), ["answers 429", "hf auth login"]),
    (http_error(403), ["answers 403", "hf auth login"]),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache"), ["No space", "free some space"]),
    (OSError(errno.EACCES, os.strerror(errno.EACCES), "/cache"), ["Permission denied"]),
    (KeyError("sha"), ["KeyError", "hf download"]),
    (ValueError("bad header"), ["bad header"]),
    (errors.HFValidationError("bad name"), ["has no model"]),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_no_network_falls_back_to_the_cache(
    cache: Path, answer: Callable[[Exception], None], error: Exception
) -> None:
    snapshot(cache, A, *WHOLE, refs=("main",))
    assert is_offline(error)
    answer(error)
    assert fetch(NAME).revision == A


@pytest.mark.parametrize("error, words", NOT_OFFLINE)
def test_nothing_else_means_offline(
    cache: Path, answer: Callable[[Exception], None], error: Exception, words: list[str]
) -> None:
    """A copy in the cache is not taken where the hub, a proxy or this machine says something."""
    snapshot(cache, A, *WHOLE, refs=("main",))
    answer(error)
    with pytest.raises(UserError) as refused:
        fetch(NAME)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
