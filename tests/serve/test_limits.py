"""Limits on what a client sends and reads, over an application that answers what it gets."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from ssd_export.serve.limits import MAX_DISCARDED_BYTES, LimitBody, LimitSend, RequireKey

SCOPE: dict[str, Any] = {"type": "http", "path": "/", "headers": []}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def answer(parts: list[bytes], most: int, seconds: float, pause: float) -> tuple[int, bytes]:
    """Status and body of what is answered to a body that comes in parts."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(pause)
        body = parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(LimitBody(echo, most, seconds)(dict(SCOPE), receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_a_body_within_the_limits_arrives_whole() -> None:
    assert answer([b"ab", b"", b"cd"], 4, 9, 0) == (200, b"abcd")


def test_a_body_beyond_the_limits_is_refused() -> None:
    status, body = answer([b"ab", b"cde"], 4, 9, 0)
    assert status == 413 and b"more than 4 bytes" in body
    status, body = answer([b"a"] * 9, 99, 0.05, 0.02)
    assert status == 408 and b"within 0.05 s" in body


def test_the_rest_of_a_body_is_read_before_it_is_refused() -> None:
    """A client that is still sending would find the connection closed, and no answer."""
    parts = [b"abc", b"d", b"efg"]
    assert answer(parts, 2, 9, 0)[0] == 413 and not parts
    parts = [b"x" * MAX_DISCARDED_BYTES, b"y", b"z"]
    assert answer(parts, 2, 9, 0)[0] == 413 and parts == [b"z"], "up to a bound alone"


def test_a_client_that_reads_nothing_is_given_up() -> None:
    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(LimitSend(echo, 0.02)(dict(SCOPE), receive, send))


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/v1/models", b"Bearer secret", 200),
        ("/v1/models", b"bearer  secret ", 200),
        ("/v1/models", b"Basic secret", 401),
        ("/v1/models", b"secret", 401),
        ("/v1/models", b"Bearer secre", 401),
        ("/v1/models", b"Bearer ", 401),
        ("/v1/models", None, 401),
        ("/health", None, 200),
        ("/", None, 200),
        ("/health/more", None, 401),
    ],
)
def test_a_key_is_a_bearer_s(path: str, header: bytes | None, status: int) -> None:
    sent: list[MutableMapping[str, Any]] = []
    headers = [] if header is None else [(b"authorization", header)]

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(RequireKey(echo, "secret")(scope, receive, send))
    assert sent[0]["status"] == status
