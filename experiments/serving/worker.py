"""The thread that owns the engine, and what the event loop sees of it.

The two sides share no data. The event loop puts commands into a queue, which the thread empties between two steps; the thread sends what
it generates through `call_soon_threadsafe`. So a client, however slow, never holds up a step: its text waits in its ticket, which
cannot grow beyond the text of the tokens that it asked for.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dsv3_jax.inference.engine import Engine, NewToken
from dsv3_jax.inference.text import StoppedText, TextStream
from experiments.serving.errors import ApiError
from experiments.serving.metrics import Metrics

_LOGGER = logging.getLogger(__name__)
WARMING_UP, READY, SHUTTING_DOWN, FAILED = "warming up", "ready", "shutting down", "failed"


class Job(NamedTuple):
    """What the engine has to do for a request."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


class Ticket:
    """A job under way, as the event loop sees it. `finish` is None until the end: "stop", "length" or "cancelled"."""

    def __init__(self, job: Job):
        self.job, self.accepted, self.tokens = job, time.monotonic(), 0
        self.finish: str | None = None
        self._unread: list[str] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    def put(self, text: str, tokens: int, finish: str | None) -> None:
        """Adds text, and the tokens generated for it."""
        self.tokens, self.finish = self.tokens + tokens, finish
        self._unread.append(text)
        if text or finish:
            self._news.set()

    def fail(self, error: ApiError) -> None:
        """Ends it; whoever reads gets the error."""
        self._error = error
        self._news.set()

    async def read(self, deadline: float) -> tuple[str, str | None]:
        """All text since the last reading, as soon as there is some or the job has ended, and `finish` as it was then.

        `deadline`: by the event loop's clock. Raises ApiError when it passes, or when the job failed.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._news.wait()
        except TimeoutError as error:
            raise ApiError(504, "the request took longer than the server's --timeout") from error
        self._news.clear()
        if self._error:
            raise self._error
        text, self._unread = "".join(self._unread), []
        return text, self.finish


class _Sequence:
    """A job in the engine, as the thread sees it."""

    def __init__(self, ticket: Ticket, tokenizer: Tokenizer):
        self.ticket, self.text, self.cut = ticket, TextStream(tokenizer), StoppedText(ticket.job.stop)
        self.newest: float | None = None  # when its last token came


class Worker:
    """Runs jobs. All methods are for the event loop that it was made in; `room` bounds how many jobs are under way."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, eos_ids: Sequence[int], metrics: Metrics, room: int):
        self.state = WARMING_UP
        self.error: BaseException | None = None  # what the engine failed with
        self._engine, self._tokenizer, self._eos_ids, self._metrics, self._room = engine, tokenizer, frozenset(eos_ids), metrics, room
        self._live: set[Ticket] = set()
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sequences: dict[int, _Sequence] = {}  # by the engine's number; the thread's own, as the engine is
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine")
        metrics.watch(lambda: max(0, len(self._live) - engine.running), lambda: engine.running)
        self._thread.start()

    @property
    def live(self) -> int:
        """Jobs accepted and not ended."""
        return len(self._live)

    def submit(self, job: Job) -> Ticket:
        """Accepts a job that fits the engine. Raises ApiError when the server is full, or ends."""
        if self.state in (SHUTTING_DOWN, FAILED):
            raise ApiError(503, f"the server is {self.state}" if self.state == SHUTTING_DOWN else "the server has failed")
        if len(self._live) >= self._room:
            raise ApiError(429, "the queue is full; try again", code="queue_full", retry_after=1)
        ticket = Ticket(job)
        self._live.add(ticket)
        self._commands.put(lambda: self._start(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drops a job, and frees its row; one that has ended is no error."""
        if ticket in self._live:
            self._commands.put(lambda: self._drop(ticket))

    def refuse(self) -> None:
        """Accepts nothing any more."""
        if self.state != FAILED:
            self.state = SHUTTING_DOWN

    def abandon(self) -> None:
        """Ends what is still under way."""
        for ticket in list(self._live):
            ticket.fail(ApiError(503, "the server is shutting down"))
            self.cancel(ticket)

    async def close(self) -> None:
        """Ends the thread, after the step that it is in."""
        self._commands.put(self._close)
        await asyncio.to_thread(self._thread.join)

    # What follows down to `_put` runs in the thread.

    def _run(self) -> None:
        try:
            self._warm_up()
            while not self._closing:
                self._obey()
                self._step()
        except BaseException as error:  # whatever it is, the engine's cache is gone with it, and clients wait
            _LOGGER.exception("the engine failed")
            self._tell(self._failed, error)

    def _warm_up(self) -> None:
        """Compiles both programs."""
        started = time.monotonic()
        self._engine.submit([0], 2)
        while not self._engine.idle:
            self._engine.step()
        _LOGGER.info("ready: compiled in %.1f s", time.monotonic() - started)
        self._tell(self._ready)

    def _obey(self) -> None:
        """Does what the event loop wants; waits for it where there is nothing else to do."""
        if self._engine.idle:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _start(self, ticket: Ticket) -> None:
        job = ticket.job
        settings: dict[str, Any] = {"temperature": job.temperature, "top_p": job.top_p, "seed": job.seed}
        number = self._engine.submit(job.prompt, job.max_tokens, eos_ids=list(self._eos_ids), **settings)
        self._sequences[number] = _Sequence(ticket, self._tokenizer)

    def _drop(self, ticket: Ticket) -> None:
        for number in [number for number, sequence in self._sequences.items() if sequence.ticket is ticket]:
            self._end(number)
            self._tell(self._put, ticket, "", 0, "cancelled")

    def _close(self) -> None:
        self._closing = True

    def _end(self, number: int) -> None:
        self._engine.cancel(number)
        del self._sequences[number]

    def _step(self) -> None:
        """A step of the engine. Tokens that it gives one request came together: those of a round."""
        drafted, accepted = self._engine.drafted, self._engine.accepted
        news = self._engine.step()
        self._metrics.drafted_tokens.inc(self._engine.drafted - drafted)
        self._metrics.accepted_tokens.inc(self._engine.accepted - accepted)
        for number, of_request in itertools.groupby(news, key=lambda new: new.request):
            self._take(number, list(of_request))

    def _take(self, number: int, news: list[NewToken]) -> None:
        """Sends what new tokens add to a request's text. Those after a stop string are dropped."""
        sequence, pieces, finish = self._sequences[number], [], None
        for new in news:
            piece, finish = self._said(sequence, new)
            pieces.append(piece)
            if finish:
                self._end(number)
                break
        self._observe(sequence, len(pieces), len(news))
        self._tell(self._put, sequence.ticket, "".join(pieces), len(pieces), finish)

    def _said(self, sequence: _Sequence, new: NewToken) -> tuple[str, str | None]:
        """The text that a token adds, and how the request ends with it if it does."""
        ended = new.token in self._eos_ids
        text = "" if ended else sequence.cut.push(sequence.text.push(new.token))
        if new.last and not sequence.cut.stopped:
            text += sequence.cut.push(sequence.text.flush())
            text += "" if sequence.cut.stopped else sequence.cut.flush()
        return text, "stop" if ended or sequence.cut.stopped else "length" if new.last else None

    def _observe(self, sequence: _Sequence, taken: int, given: int) -> None:
        """Counts tokens taken of those that a step gave."""
        now = time.monotonic()
        if sequence.newest is None:
            self._metrics.prompt_tokens.inc(len(sequence.ticket.job.prompt))
            self._metrics.first_token.observe(now - sequence.ticket.accepted)
        else:
            for _ in range(taken):
                self._metrics.between_tokens.observe((now - sequence.newest) / given)
        self._metrics.generated_tokens.inc(taken)
        sequence.newest = now

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    # What follows runs in the event loop again.

    def _put(self, ticket: Ticket, text: str, tokens: int, finish: str | None) -> None:
        ticket.put(text, tokens, finish)
        if finish:
            self._live.discard(ticket)

    def _ready(self) -> None:
        if self.state == WARMING_UP:
            self.state = READY

    def _failed(self, error: BaseException) -> None:
        self.state, self.error = FAILED, error
        for ticket in self._live:
            ticket.fail(ApiError(500, "the server has failed"))
        self._live.clear()
