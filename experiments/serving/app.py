"""The HTTP side: routes, bodies, streams, and how each request ends."""

import asyncio
import json
import time
from collections.abc import Awaitable, Iterable
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from experiments.serving.answers import Answer, usage
from experiments.serving.calls import Call, Served, read_call
from experiments.serving.errors import ApiError
from experiments.serving.metrics import Metrics
from experiments.serving.worker import READY, Ticket, Worker


class Limits(NamedTuple):
    """What one request may cost."""

    timeout: float  # seconds, waiting included
    max_body: int  # bytes


def make_app(worker: Worker, served: Served, metrics: Metrics, limits: Limits) -> Starlette:
    """The ASGI application."""
    card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "dsv3_jax"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != served.name:
            raise ApiError(404, f"there is no such model; this server has {served.name!r}", "model", "model_not_found")
        return JSONResponse(card)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": worker.state}, 200 if worker.state == READY else 503)

    async def figures(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/v1/completions", _Generation(False, worker, served, metrics, limits), methods=["POST"]),
        Route("/v1/chat/completions", _Generation(True, worker, served, metrics, limits), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", figures),
    ]
    return Starlette(routes=routes, exception_handlers={ApiError: _refused, HTTPException: _not_served, Exception: _broken})


class _Generation:
    """An endpoint that generates, as an ASGI application of its own."""

    def __init__(self, chat: bool, worker: Worker, served: Served, metrics: Metrics, limits: Limits):
        self._chat, self._worker, self._served, self._metrics, self._limits = chat, worker, served, metrics, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "failed"
        try:
            outcome = await self._answer(Request(scope, receive), send)
        except ApiError as error:
            outcome = error.outcome
            await error.response()(scope, receive, send)
        except ClientDisconnect:
            outcome = "disconnected"
        finally:
            self._metrics.requests.labels("chat" if self._chat else "completions", outcome).inc()

    async def _answer(self, request: Request, send: Send) -> str:
        """Reads a request and answers it; how it ended. Raises ApiError where nothing is sent yet."""
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        body = await _read_body(request, deadline, self._limits.max_body)
        call = await asyncio.to_thread(read_call, body, self._chat, self._served)
        ticket = self._worker.submit(call.job)
        try:
            answer = self._stream if call.stream else self._whole
            return await while_connected(request.receive, answer(call, ticket, deadline, request, send))
        finally:
            self._worker.cancel(ticket)

    async def _whole(self, call: Call, ticket: Ticket, deadline: float, request: Request, send: Send) -> str:
        text, finish = "", None
        while not finish:
            piece, finish = await ticket.read(deadline)
            text += piece
        body = Answer.new(self._chat, self._served.name).whole(text, finish, usage(len(call.job.prompt), ticket.tokens))
        await JSONResponse(body)(request.scope, request.receive, send)
        return "completed"

    async def _stream(self, call: Call, ticket: Ticket, deadline: float, request: Request, send: Send) -> str:
        answer = Answer.new(self._chat, self._served.name)
        text, finish = await ticket.read(deadline)
        # Only now, so that what goes wrong before the first text has a status of its own.
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_events(send, answer.opening())
        try:
            while not finish:  # as of the last reading: the job may end while a send waits for the client, with text that is not read yet
                await _send_events(send, [answer.piece(text)])
                text, finish = await ticket.read(deadline)
        except ApiError as error:
            await _send_events(send, [error.body()], last=True)
            return error.outcome
        counted = [answer.counted(usage(len(call.job.prompt), ticket.tokens))] if call.include_usage else []
        await _send_events(send, [*([answer.piece(text)] if text else []), answer.ending(finish), *counted, "[DONE]"], last=True)
        return "completed"


async def while_connected(receive: Receive, work: Awaitable[str]) -> str:
    """What `work` gives; when the client leaves first, cancels it and raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_leaves_before(receive, task))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if left.done() and left.result():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _leaves_before(receive: Receive, task: asyncio.Future[str]) -> bool:
    """Whether the client was gone before the task ended; sending to one that is gone goes on without an error, and may end it."""
    while (await receive())["type"] != "http.disconnect":
        continue
    return not task.done()


async def _read_body(request: Request, deadline: float, limit: int) -> bytes:
    """The body. Raises ApiError for one that is too long, too slow, or not said to be JSON."""
    # A page of another site can make a browser send text here unasked, but no JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in request.stream():
                size += len(chunk)
                body += chunk if size <= limit else b""  # the rest is read too, else the client would write into a closed connection
    except TimeoutError as error:
        raise ApiError(408, "the body took longer than the server's --timeout") from error
    if size > limit:
        raise ApiError(413, f"a body of {size} bytes; the server's --max_body is {limit}")
    return bytes(body)


async def _send_events(send: Send, values: Iterable[Any], last: bool = False) -> None:
    """Sends server-sent events; waits while the client does not read."""
    text = "".join(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n" for value in values)
    await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}"
    response = ApiError(error.status_code, f"{what}: {error.detail.lower()}").response()
    response.headers.update(error.headers or {})
    return response


async def _broken(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server made an error; its log has it").response()
