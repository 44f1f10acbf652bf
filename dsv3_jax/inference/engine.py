"""Continuous batching: sequences join and leave a running batch, over one paged cache and two compiled programs.

A step reads one chunk of one waiting prompt, then decodes one token of every running sequence. Both programs have fixed shapes, a
chunk of one sequence and one token of each row; what changes are the page table, positions and settings, so nothing is compiled again
as lengths change. A request gets all pages that it can need when it is admitted, so a running sequence never waits for memory.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.decode import forward_stored
from dsv3_jax.inference.paged import NOBODY, init_pages, paged
from dsv3_jax.inference.sampling import GREEDY, Sampling, sample_rows
from dsv3_jax.model.transformer import Execution, Params, RouterBias, logits


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Sizes that shapes are compiled for."""

    rows: int = 8  # sequences decoded together
    pages: int = 129  # of the pool, with the one that is nobody's
    page_size: int = 64  # tokens
    chunk: int = 128  # prompt tokens read in a step
    fp8: bool = False  # c_kv in E4M3


class NewToken(NamedTuple):
    """A token of a request; `last` when no other follows."""

    request: int
    token: int
    last: bool


@dataclasses.dataclass
class _Sequence:
    request: int
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0  # tokens in the cache
    generated: int = 0
    newest: int = 0  # the token that decoding reads next


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="cache")
def forward_pages(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    last: Int[Array, " b"],
    table: Int[Array, "b n"],
    sampling: Sampling,
    seeds: UInt32[Array, " b"],
    cache: Cache,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Int[Array, " b"], Cache]:
    """The token drawn after number `last` of each row's tokens, and the cache with all of them.

    A draw depends on the request's seed and the position alone, not on who else is in the batch.
    """
    mask = jnp.arange(table.shape[1] * cache.moe.k_r.shape[2]) <= positions[:, :, None]
    hidden, cache = forward_stored(params, bias, tokens, positions, cache, mask, paged(table, execution.impl), config, execution)
    rows = jnp.arange(len(last))
    return sample_rows(logits(params, hidden[rows, last]), seeds, positions[rows, last], sampling), cache


class Engine:
    """Generates for many requests at once. Not for several threads."""

    def __init__(self, params: Params, bias: RouterBias, config: ModelConfig, execution: Execution, settings: EngineSettings):
        self._model, self._static, self._settings = (params, bias), (config, execution), settings
        # A sequence may be as long as the model takes; a chunk that overhangs needs positions, but no pages.
        self._longest = config.max_position_embeddings
        self._table_width = -(-(self._longest + settings.chunk) // settings.page_size)
        # Placed as parameters are, which is where a step leaves it: otherwise each program would be compiled for both places.
        place = jax.tree.leaves(params)[0].sharding
        self._cache = jax.device_put(init_pages(config, settings.pages, settings.page_size, execution.dtype, settings.fp8), place)
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
        pages = self._pages_for(total)
        if not prompt or max_new_tokens < 1 or total > self._longest:
            raise ValueError(f"prompt of {len(prompt)} tokens and {max_new_tokens} new ones: both at least 1, together {self._longest}")
        if pages >= self._settings.pages:
            raise ValueError(f"{total} tokens need {pages} pages, the pool has {self._settings.pages - 1}; give it more")
        self._requests += 1
        sampling = Sampling(temperature, top_p)
        self._waiting.append(_Sequence(self._requests, list(prompt), max_new_tokens, sampling, seed, frozenset(eos_ids)))
        return self._requests

    def cancel(self, request: int) -> None:
        """Drops a request, waiting or running; one that is done already is no error."""
        self._waiting = collections.deque(s for s in self._waiting if s.request != request)
        for sequence in self._rows:
            if sequence and sequence.request == request:
                self._release(sequence)

    def step(self) -> list[NewToken]:
        """Admits who fits, reads one chunk of a prompt, decodes one token of every sequence whose prompt is read."""
        self._admit()
        decoding = [s if s and s.read >= len(s.prompt) else None for s in self._rows]
        return self._prefill() + (self._decode(decoding) if any(decoding) else [])

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._settings.page_size)

    def _admit(self) -> None:
        """In order of arrival: a long request is not overtaken, so it does not wait for ever."""
        while self._waiting and None in self._rows:
            sequence = self._waiting[0]
            needed = self._pages_for(len(sequence.prompt) + sequence.max_new_tokens)
            if needed > len(self._free):
                return
            sequence.pages = [self._free.pop() for _ in range(needed)]
            self._rows[self._rows.index(None)] = self._waiting.popleft()

    def _prefill(self) -> list[NewToken]:
        """Reads the next chunk of the oldest prompt that is not read yet."""
        unread = [s for s in self._rows if s and s.read < len(s.prompt)]
        if not unread:
            return []
        sequence = min(unread, key=lambda s: s.request)
        piece = sequence.prompt[sequence.read : sequence.read + self._settings.chunk]
        tokens = np.zeros((1, self._settings.chunk), np.int32)
        tokens[0, : len(piece)] = piece
        positions = sequence.read + np.arange(self._settings.chunk, dtype=np.int32)[None]
        drawn = self._run(tokens, positions, np.array([len(piece) - 1], np.int32), [sequence])
        sequence.read += len(piece)
        return [self._took(sequence, drawn[0])] if sequence.read == len(sequence.prompt) else []

    def _decode(self, rows: list[_Sequence | None]) -> list[NewToken]:
        tokens = np.array([[s.newest if s else 0] for s in rows], np.int32)
        positions = np.array([[s.read if s else 0] for s in rows], np.int32)
        drawn = self._run(tokens, positions, np.zeros(len(rows), np.int32), rows)
        for sequence in filter(None, rows):
            sequence.read += 1
        return [self._took(sequence, token) for sequence, token in zip(rows, drawn, strict=True) if sequence]

    def _run(self, tokens: np.ndarray, positions: np.ndarray, last: np.ndarray, rows: Sequence[_Sequence | None]) -> list[int]:
        table = np.full((len(rows), self._table_width), NOBODY, np.int32)
        for line, sequence in zip(table, rows, strict=True):
            if sequence:
                line[: len(sequence.pages)] = sequence.pages
        sampling = Sampling(*np.array([s.sampling if s else GREEDY for s in rows], np.float32).T)
        seeds = np.array([s.seed if s else 0 for s in rows], np.uint32)
        drawn, self._cache = forward_pages(*self._model, tokens, positions, last, table, sampling, seeds, self._cache, *self._static)
        return np.asarray(drawn).tolist()

    def _took(self, sequence: _Sequence, token: int) -> NewToken:
        """Notes a new token; a sequence that ends with it leaves."""
        sequence.newest, sequence.generated = token, sequence.generated + 1
        last = sequence.newest in sequence.eos_ids or sequence.generated == sequence.max_new_tokens
        if last:
            self._release(sequence)
        return NewToken(sequence.request, sequence.newest, last)

    def _release(self, sequence: _Sequence) -> None:
        self._rows[self._rows.index(sequence)] = None
        self._free += reversed(sequence.pages)
