"""The HTTP application: OpenAI's Images routes, health, metrics, and the page.

Every answer that is not a success has OpenAI's error body. A client that leaves gives its images'
places back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ssd_export.errors import UserError
from ssd_export.runtime.images import preview_rows
from ssd_export.serve.batcher import (
    ClosingError,
    DeadlineError,
    ImageEvent,
    MicroBatcher,
    QueueFullError,
    Ticket,
)
from ssd_export.serve.generation import (
    GeneratorBatches,
    image_requests,
    server_facts,
)
from ssd_export.serve.limits import LimitBody, LimitSend, RequireKey, error_body
from ssd_export.serve.metrics import Metrics
from ssd_export.serve.schema import (
    ErrorResponse,
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    Model,
    ModelList,
    ServerFacts,
    TokenDetails,
    Usage,
    encoded,
)
from ssd_export.version import TOOL_VERSION

MAX_UNREAD_EVENTS = 8  # previews beyond it are left out where a client reads slowly
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 408, 413, 429, 500, 503, 504)
}
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
NO_OBJECT = (
    "the body is no JSON object; send one with Content-Type: application/json, such as"
    ' {"prompt": "a red circle on white"}'
)
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": EVENT}}},  # with stream, else JSON
    **ERRORS,
}


@dataclass
class Server:
    """State that the routes share. opened: the generator in use, which `reload` replaces."""

    batcher: MicroBatcher
    metrics: Metrics
    runner: str
    max_batch: int
    seconds: float
    opened: list[GeneratorBatches]
    started: int

    @property
    def batches(self) -> GeneratorBatches:
        """The generator in use."""
        return self.opened[-1]

    @property
    def model(self) -> Model:
        """The one model."""
        return Model(id=self.batches.generator.bundle.config.model_name, created=self.started)


def make_app(server: Server, key: str | None = None) -> FastAPI:
    """The application over an open server. key: what clients must send, None: nothing."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.batcher.close)

    app = FastAPI(
        title="ssd-export",
        version=TOOL_VERSION,
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from foreign hosts
        redoc_url=None,
    )
    app.add_middleware(LimitBody)
    app.add_middleware(LimitSend)
    if key:
        app.add_middleware(RequireKey, key=key)
    _answer_errors(app)
    _add_image_routes(app, server)
    _add_other_routes(app, server)
    return app


def _answer_errors(app: FastAPI) -> None:
    def answer(
        status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> JSONResponse:
        return JSONResponse(error_body(status, message, param, code), status, headers or None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid" or (not where and first["type"] != "value_error"):
            return answer(400, NO_OBJECT)
        message = f"{'.'.join(where)}: {first['msg']}" if where else str(first["msg"])
        return answer(400, message, where[0] if where else None)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        unread = error.status_code == 400  # FastAPI: not UTF-8, or nested too deeply
        return answer(error.status_code, NO_OBJECT if unread else str(error.detail))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        seconds = str(round(error.seconds))
        return answer(429, str(error), code="rate_limit_exceeded", **{"Retry-After": seconds})

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        status = {DeadlineError: 504, ClosingError: 503}.get(type(error), 400)
        return answer(status, str(error))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return answer(500, f"the server failed ({type(error).__name__}); its log says where")


def _add_image_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/images/generations", response_model=GenerationResponse, responses=ANSWERS)
    async def generate(body: GenerationRequest, request: Request) -> Response:
        """Generate images from a prompt.

        With stream the answer is text/event-stream: image_generation.partial_image events, then
        image_generation.completed.
        """
        began = time.monotonic()
        try:
            submission = _submit(server, body, request)
        except UserError as error:
            status = {QueueFullError: 429, ClosingError: 503}.get(type(error), 400)
            server.metrics.request(status, time.monotonic() - began)
            raise
        if body.stream:
            return StreamingResponse(
                _events(server, submission, began),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        try:
            content = await _whole_response(submission, request)
        except Exception as error:
            status = getattr(error, "status_code", 504 if isinstance(error, DeadlineError) else 500)
            server.metrics.request(status, time.monotonic() - began)
            raise
        finally:
            submission.ticket.cancel()
        server.metrics.request(200, time.monotonic() - began)
        return JSONResponse(content.model_dump(exclude_none=True))


def _add_other_routes(app: FastAPI, server: Server) -> None:
    page = (files("ssd_export.serve") / "page.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    policy += "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'self'"

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        """Say that the server takes requests, and how many images wait."""
        return {"status": "ok", "waiting": server.batcher.num_waiting}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(server.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @app.get("/about")
    async def about() -> ServerFacts:
        """Policy, head groups, slots and cache bytes of the bundle that is served."""
        return server_facts(server.batches, server.runner, server.max_batch)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[server.model])

    @app.get("/v1/models/{model_id}", responses={404: {"model": ErrorResponse}})
    async def model(model_id: str) -> Model:
        """The model of that name."""
        if model_id != server.model.id:
            raise HTTPException(404, f"no model {model_id}; this server has {server.model.id}")
        return server.model


@dataclass
class Submission:
    """A request under way: its events arrive in the queue, on the event loop's thread."""

    body: GenerationRequest
    ticket: Ticket
    events: asyncio.Queue[ImageEvent]
    size: str
    usage: Usage
    num_images: int

    def answer(self, event: ImageEvent) -> str:
        """The image of an event as the body asked for it, base64."""
        assert event.image is not None
        name = self.body.output_format or "png"
        return encoded(event.image, name, self.body.output_compression)


def _submit(server: Server, body: GenerationRequest, request: Request) -> Submission:
    """Puts the images of a request into the queue. Raises: UserError for what cannot be generated,
    a full queue or a stopping server.
    """
    generator = server.batches.generator
    size = f"{generator.config.image_width}x{generator.config.image_height}"
    if body.model not in (None, server.model.id):
        raise UserError(f"no model {body.model!r}; this server has {server.model.id!r}")
    if body.size not in (None, "auto", size):
        raise UserError(f"size {body.size!r}: this model's images are {size}; leave size out")
    requests = image_requests(body, generator)
    text = len(requests) * generator.check_requests(requests[:1])[0]
    events: asyncio.Queue[ImageEvent] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(event: ImageEvent) -> None:
        if event.is_done or event.error or events.qsize() < MAX_UNREAD_EVENTS:
            events.put_nowait(event)

    previews = body.partial_images or 0 if body.stream else 0

    def deliver(event: ImageEvent) -> None:
        loop.call_soon_threadsafe(put, event)

    ticket = server.batcher.submit(
        requests,
        deliver,
        caller=f"{request.client.host if request.client else ''} {body.user or ''}",
        seconds=server.seconds,
        preview_rows=preview_rows(previews, server.batches.num_rows),
    )
    tokens = len(requests) * generator.config.grid.num_tokens
    details = TokenDetails(text_tokens=text)
    usage = Usage(
        input_tokens=text,
        output_tokens=tokens,
        total_tokens=text + tokens,
        input_tokens_details=details,
    )
    return Submission(body, ticket, events, size, usage, len(requests))


async def _whole_response(submission: Submission, request: Request) -> GenerationResponse:
    """Waits for all images, or for the client to leave. Raises: UserError of an image."""
    images: dict[int, str] = {}
    while len(images) < submission.num_images:
        event = await _next_event(submission, request)
        if event.error is not None:
            raise event.error
        if event.is_done:
            images[event.index] = await asyncio.to_thread(submission.answer, event)
    return GenerationResponse(
        created=int(time.time()),
        data=[GeneratedImage(b64_json=images[index]) for index in sorted(images)],
        output_format=submission.body.output_format or "png",
        size=submission.size,
        usage=submission.usage,
    )


async def _next_event(submission: Submission, request: Request) -> ImageEvent:
    """The next event; cancels the ticket where the client has left meanwhile."""
    while True:
        try:
            return await asyncio.wait_for(submission.events.get(), 0.5)
        except asyncio.TimeoutError:
            if await request.is_disconnected():
                submission.ticket.cancel()
                raise HTTPException(499, "the client has left") from None


async def _events(server: Server, submission: Submission, began: float) -> AsyncIterator[str]:
    """Server-sent events of a request; a client that leaves ends the generator."""
    finished, sent = 0, [0] * submission.num_images
    try:
        while finished < submission.num_images:
            event = await submission.events.get()
            if event.error is not None:
                status = 504 if isinstance(event.error, DeadlineError) else 500
                text = str(event.error) if isinstance(event.error, UserError) else "see the log"
                yield _event("error", {"type": "error", **error_body(status, text)})
                server.metrics.request(status, time.monotonic() - began)
                return
            name = "completed" if event.is_done else "partial_image"
            content = {
                "type": f"image_generation.{name}",
                "b64_json": await asyncio.to_thread(submission.answer, event),
                "created_at": int(time.time()),
                "size": submission.size,
                "quality": "auto",
                "background": "opaque",
                "output_format": submission.body.output_format or "png",
                "image_index": event.index,
            }
            if event.is_done:
                finished += 1
                content["usage"] = submission.usage.model_dump()
            else:
                content |= {"partial_image_index": sent[event.index], "row": event.row}
                sent[event.index] += 1
            yield _event(f"image_generation.{name}", content)
        server.metrics.request(200, time.monotonic() - began)
    finally:
        submission.ticket.cancel()


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"
