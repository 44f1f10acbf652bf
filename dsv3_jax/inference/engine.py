"""Continuous batching: sequences join and leave a running batch, over one paged cache and two compiled programs.

A step reads one chunk of one waiting prompt, then decodes every running sequence: one token, or one round of drafts of the MTP modules.
Both programs have fixed shapes, a chunk of one sequence and a token or round of each row; what changes are the page table, positions
and settings, so nothing is compiled again as lengths change. A request gets all pages that it can need when it is admitted, so a
running sequence never waits for memory.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.decoders import OneByOne, Rows, Speculating
from dsv3_jax.inference.paged import NOBODY, init_pages
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.model.transformer import Execution, Params, RouterBias


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Sizes that shapes are compiled for."""

    rows: int = 8  # sequences decoded together
    pages: int = 129  # of the pool, with the one that is nobody's
    page_size: int = 64  # tokens
    chunk: int = 128  # prompt tokens read in a step
    fp8: bool = False  # c_kv in E4M3
    drafts: int = 0  # tokens that MTP modules draft a round; 0: none

    def __post_init__(self) -> None:
        """Raises ValueError for sizes with which nothing would ever run."""
        for name, least in (("rows", 1), ("pages", 2), ("page_size", 1), ("chunk", 1), ("drafts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page_size)

    def pages_of(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens: the last one is never read, but a round may read so many drafts from its place on."""
        return self.pages_for(tokens - 1 + self.drafts)


class NewToken(NamedTuple):
    """A token of a request; `last` when no other follows."""

    request: int
    token: int
    last: bool


@dataclasses.dataclass
class _Sequence:
    request: int
    tokens: list[int]  # the prompt, then what was generated
    prompt: int  # tokens of it
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0  # tokens of the prompt that are in the cache

    @property
    def is_read(self) -> bool:
        """Whether the next token is there to be decoded from."""
        return self.read == self.prompt


class Engine:
    """Generates for many requests at once. Not for several threads."""

    def __init__(self, params: Params, bias: RouterBias, config: ModelConfig, execution: Execution, settings: EngineSettings):
        if settings.drafts and not config.num_nextn_predict_layers:
            raise ValueError(f"{settings.drafts} drafts, 0 MTP modules: give 0 drafts, or modules")
        self._settings, self._longest = settings, config.max_position_embeddings
        cache = init_pages(config, settings.pages, settings.page_size, execution.dtype, settings.fp8)
        model = (params, bias, cache, config, execution)
        self._decoder = Speculating(*model, settings.rows, settings.drafts) if settings.drafts else OneByOne(*model)
        # A sequence may be as long as the model takes; a chunk that overhangs needs positions, but no pages. Modules run over
        # positions before the first too: in the last page, which has to be nobody's.
        self._table_width = max(
            settings.pages_for(self._longest + settings.chunk), settings.pages_of(self._longest) + bool(settings.drafts)
        )
        self._free = list(range(settings.pages - 1, NOBODY, -1))
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._rows: list[_Sequence | None] = [None] * settings.rows
        self._requests = 0

    @property
    def waiting(self) -> int:
        """Requests that no token has been read of."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(sequence is not None for sequence in self._rows)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    @property
    def drafted(self) -> int:
        """Drafts in all rounds of all requests so far."""
        return self._decoder.drafted

    @property
    def accepted(self) -> int:
        """Those that the model kept, past the end of a request too: divided by `drafted`, how good drafts are."""
        return self._decoder.accepted

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(self._rows)

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_ids: Sequence[int] = (),
    ) -> int:
        """Queues a prompt; returns the number of the request. Raises ValueError for one that could never run."""
        total = len(prompt) + max_new_tokens
        pages = self._settings.pages_of(total)
        if not prompt or max_new_tokens < 1 or total > self._longest:
            raise ValueError(f"prompt of {len(prompt)} tokens and {max_new_tokens} new ones: both at least 1, together {self._longest}")
        if pages >= self._settings.pages:
            raise ValueError(f"{total} tokens need {pages} pages, the pool has {self._settings.pages - 1}; give it more")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed = {seed}: must lie in 0..2**32 - 1")
        self._requests += 1
        sampling = Sampling(temperature, top_p)
        self._waiting.append(_Sequence(self._requests, list(prompt), len(prompt), max_new_tokens, sampling, seed, frozenset(eos_ids)))
        return self._requests

    def cancel(self, request: int) -> None:
        """Drops a request, waiting or running; one that is done already is no error."""
        self._waiting = collections.deque(s for s in self._waiting if s.request != request)
        for sequence in self._rows:
            if sequence and sequence.request == request:
                self._release(sequence)

    def step(self) -> list[NewToken]:
        """Admits who fits, reads one chunk of a prompt, decodes every sequence whose prompt is read: one token, or those of a round."""
        self._admit()
        decoding = [s if s and s.is_read else None for s in self._rows]
        return self._prefill() + (self._decode(decoding) if any(decoding) else [])

    def _admit(self) -> None:
        """In order of arrival: a long request is not overtaken, so it does not wait for ever."""
        while self._waiting and None in self._rows:
            sequence = self._waiting[0]
            needed = self._settings.pages_of(sequence.prompt + sequence.max_new_tokens)
            if needed > len(self._free):
                return
            sequence.pages = [self._free.pop() for _ in range(needed)]
            self._rows[self._rows.index(None)] = self._waiting.popleft()

    def _prefill(self) -> list[NewToken]:
        """Reads the next chunk of the oldest prompt that is not read yet."""
        unread = [s for s in self._rows if s and not s.is_read]
        if not unread:
            return []
        sequence, size = min(unread, key=lambda s: s.request), self._settings.chunk
        piece = sequence.tokens[sequence.read :][: size + self._decoder.ahead]
        tokens = np.zeros((1, size + self._decoder.ahead), np.int32)
        tokens[0, : len(piece)] = piece
        count, row = min(size, len(piece)), self._rows.index(sequence)
        drawn = self._decoder.read(row, sequence.read, count, tokens, self._what_programs_know([sequence]))
        sequence.read += count
        return self._take(sequence, [drawn]) if sequence.is_read else []

    def _decode(self, rows: list[_Sequence | None]) -> list[NewToken]:
        newest = np.zeros((len(rows), self._decoder.window), np.int32)
        for line, sequence in zip(newest, rows, strict=True):
            tokens = sequence.tokens[-len(line) :] if sequence else [0]
            line[-len(tokens) :] = tokens
        known = np.array([len(s.tokens) - 1 if s else newest.shape[1] - 1 for s in rows], np.int32)
        running = np.array([s is not None for s in rows])
        drawn = self._decoder.decode(newest, known, running, self._what_programs_know(rows))
        return [new for sequence, tokens in zip(rows, drawn, strict=True) if sequence for new in self._take(sequence, tokens)]

    def _what_programs_know(self, rows: Sequence[_Sequence | None]) -> Rows:
        table = np.full((len(rows), self._table_width), NOBODY, np.int32)
        for line, sequence in zip(table, rows, strict=True):
            if sequence:
                line[: len(sequence.pages)] = sequence.pages
        sampling = Sampling(*np.array([s.sampling if s else GREEDY for s in rows], np.float32).T)
        return Rows(np.array([s.seed if s else 0 for s in rows], np.uint32), sampling, table)

    def _take(self, sequence: _Sequence, tokens: list[int]) -> list[NewToken]:
        """Notes new tokens, up to the one that the sequence ends with, if it does; then it leaves."""
        taken: list[NewToken] = []
        for token in tokens:
            sequence.tokens.append(token)
            last = token in sequence.eos_ids or len(sequence.tokens) == sequence.prompt + sequence.max_new_tokens
            taken.append(NewToken(sequence.request, token, last))
            if last:
                self._release(sequence)
                break
        return taken

    def _release(self, sequence: _Sequence) -> None:
        self._rows[self._rows.index(sequence)] = None
        self._free += reversed(sequence.pages)
