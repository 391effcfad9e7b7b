"""An HTTP connection that does not wait for ever for a request's head."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_A_HEAD = 10.0


class Connection(H11Protocol):
    """uvicorn's connection, closed where a request's head is not there in time: uvicorn limits only
    how long a connection may be idle.
    """

    seconds_for_a_head = SECONDS_FOR_A_HEAD
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time of the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        """Starts the time of the next head."""
        super().on_response_complete()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the time."""
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _wait_for_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.seconds_for_a_head, self._check_head)

    def _check_head(self) -> None:
        has_request = self.cycle is not None and not self.cycle.response_complete
        if not has_request and not self.transport.is_closing():
            self.transport.close()
