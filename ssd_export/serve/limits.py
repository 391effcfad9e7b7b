"""Limits on a request before its route sees it: body size, time to send it, bearer key.

Plain ASGI, so that nothing is kept that would be refused.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 64 << 10  # a prompt of 4,000 characters is 16 KB at most, 24 KB in escapes
MAX_DISCARDED_BYTES = 16 << 20  # read past the limit, so that a client that sends on reads why
SECONDS_FOR_A_BODY = 10.0
SECONDS_FOR_A_MESSAGE = 60.0  # of an answer, until the client's buffers have taken it
OPEN_PATHS = ("/", "/health")  # the page asks its reader for the key, a probe has none


class LimitBody:
    """Refuses a body that is too large (413) or comes too slowly (408)."""

    def __init__(
        self, app: App, most: int = MAX_BODY_BYTES, seconds: float = SECONDS_FOR_A_BODY
    ) -> None:
        """Wraps an application."""
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Reads the body, then calls the application with it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            await refuse(send, 408, f"the body did not arrive within {self._seconds:g} s")
            return
        if body is None:
            await refuse(send, 413, f"the body has more than {self._most} bytes")
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """The whole body, or None where it is too large: then the rest is read and thrown away, up
        to a bound.
        """
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 19 or int(length) > MAX_DISCARDED_BYTES):
            return None
        body, size = b"", 0
        while True:
            message = await receive()
            piece = message.get("body", b"")
            size += len(piece)
            body = body + piece if size <= self._most else b""
            if size > MAX_DISCARDED_BYTES:
                return None
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return body if size <= self._most else None


class LimitSend:
    """Gives up on a client that does not read its answer; the connection is then closed."""

    def __init__(self, app: App, seconds: float = SECONDS_FOR_A_MESSAGE) -> None:
        """Wraps an application."""
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Calls the application with a send that raises TimeoutError."""

        async def limited(message: Message) -> None:
            await asyncio.wait_for(send(message), self._seconds)

        await self._app(scope, receive, limited)


class RequireKey:
    """Asks for `Authorization: Bearer KEY` on every path but the page and the health probe."""

    def __init__(self, app: App, key: str) -> None:
        """Wraps an application."""
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Calls the application if the key is right."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            header = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = header.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                await refuse(
                    send, 401, "send the server's key: Authorization: Bearer KEY", "invalid_api_key"
                )
                return
        await self._app(scope, receive, send)


async def refuse(send: Send, status: int, message: str, code: str | None = None) -> None:
    """Answers with an error in OpenAI's shape, and closes the connection."""
    content = json.dumps(error_body(status, message, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of an error: {"error": {message, type, param, code}}."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
