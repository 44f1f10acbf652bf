"""From a bound socket to a clean end: what a server does when it starts, when it is told to stop, and when its engine fails."""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import Generator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.decode import at_rest
from dsv3_jax.inference.engine import Engine, EngineSettings
from dsv3_jax.training.run import Run
from dsv3_jax.training.stopping import StopSignal
from experiments.serving.app import Limits, make_app
from experiments.serving.calls import Served
from experiments.serving.metrics import Metrics
from experiments.serving.worker import FAILED, Worker
from experiments.sources import check_drafts

_PAGE_SIZE, _CHUNK = 64, 128  # tokens of a page of the cache, and of a prompt read in a step
_DEFAULT_CONTEXT = 4096  # tokens
_POLL, _LAST_WORDS = 0.05, 5  # seconds between looks; seconds for clients to take answers that are ready


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags of experiments.serve say; seconds, bytes, tokens."""

    name: str | None = None  # None: that of the folder
    rows: int = 8
    context: int | None = None  # None: what the model takes, _DEFAULT_CONTEXT at most
    fp8_cache: bool = False
    drafts: int = 0
    max_queue: int = 64
    timeout: float = 600.0
    max_body: int = 2**20
    grace: float = 30.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, so that no other server takes its port while this one loads; port 0 takes a free one. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError("--host", host, f"is no address: {getattr(error, 'strerror', None) or error}") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError("--port", port, f"cannot be used at {host}: {error.strerror}; choose another, or 0 for a free one") from error
    return bound


def url(bound: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(run: Run, settings: Settings, bound: socket.socket, stop: StopSignal) -> None:
    """Serves until `stop`, then ends in order. Raises what the engine failed with, and ConfigError."""
    metrics, engine, served = Metrics(), *_prepare(run, settings)
    worker = Worker(engine, served.tokenizer, run.eos_ids, metrics, settings.rows + settings.max_queue)
    try:
        server = _Server(_uvicorn_config(make_app(worker, served, metrics, Limits(settings.timeout, settings.max_body)), settings.timeout))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not (server.started or serving.done()):
            await asyncio.sleep(_POLL)
        if server.started:
            print(f"serving {served.name} at {url(bound)}/v1 until Ctrl-C", flush=True)
        while not (stop.received or worker.state == FAILED or serving.done()):
            await asyncio.sleep(_POLL)
        await _drain(worker, settings.grace)
        server.should_exit = True
        await serving
    finally:
        await worker.close()
    if worker.error:
        raise worker.error


def _prepare(run: Run, settings: Settings) -> tuple[Engine, Served]:
    """An engine with room for `rows` sequences of `context` tokens, and the model as requests see it."""
    longest = run.config.model.max_position_embeddings
    context = settings.context or min(longest, _DEFAULT_CONTEXT)
    if context > longest:
        raise ConfigError("--context", context, f"the model takes {longest} tokens; give at most so many")
    check_drafts(settings.drafts, run.config.model)
    sizes = EngineSettings(settings.rows, page_size=_PAGE_SIZE, chunk=_CHUNK, fp8=settings.fp8_cache, drafts=settings.drafts)
    sizes = dataclasses.replace(sizes, pages=settings.rows * sizes.pages_of(context) + 1)
    model = dataclasses.replace(run.config.model, max_position_embeddings=context)  # a step reads as much cache as this allows
    engine = Engine(at_rest(run.params, run.execution), run.router_bias, model, run.execution, sizes)
    name = settings.name or run.folder.resolve().name
    return engine, Served(name, run.folder, run.tokenizer, model.vocab_size, context)


def _uvicorn_config(app: Starlette, patience: float) -> uvicorn.Config:
    return uvicorn.Config(
        app, loop="asyncio", http=_patient(patience), ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False,
        server_header=False, timeout_graceful_shutdown=_LAST_WORDS,
    )  # fmt: skip


async def _drain(worker: Worker, grace: float) -> None:
    """Refuses new requests, with a status that says why, while the running ones end or run out of time."""
    worker.refuse()
    end = asyncio.get_running_loop().time() + grace
    while worker.live and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_POLL)
    worker.abandon()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals alone: uvicorn would stop listening at once, and end the process by the signal."""
        yield


def _patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP, which drops a client that sends no whole request head, or leaves a full buffer unread, for so long."""

    class Patient(H11Protocol):
        _silent: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._silent = self.loop.call_later(seconds, self._drop_silent)

        def _drop_silent(self) -> None:
            if self.cycle is None:  # uvicorn's: no request has begun
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stalled:
                self._stalled.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._silent, self._stalled):
                if timer:
                    timer.cancel()

    return Patient
