"""What the engine runs on the device: a token of each row a step, or rounds of drafts and their verification.

Each decoder has two compiled programs of fixed shapes: one reads a chunk of one prompt, one decodes all rows. It owns the cache, in pages.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.decode import forward_stored
from dsv3_jax.inference.paged import in_pages
from dsv3_jax.inference.sampling import Sampling, sample_rows
from dsv3_jax.inference.speculative import modules_used, new_speculation, read_prompts, speculate_round, window_of
from dsv3_jax.model.transformer import Execution, Params, RouterBias, logits
from pallas_kernels.backend import use_pallas
from pallas_kernels.mla_decode import MAX_TOKENS

_log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """What a program has to know of each sequence that it runs."""

    seeds: UInt32[np.ndarray, " b"]
    sampling: Sampling
    table: Int[np.ndarray, "b n"]


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="cache")
def forward_pages(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    last: Int[Array, " b"],
    seeds: UInt32[Array, " b"],
    sampling: Sampling,
    table: Int[Array, "b n"],
    cache: Cache,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Int[Array, " b"], Cache]:
    """The token drawn after number `last` of each row's tokens, and the cache with all of them.

    A draw depends on the request's seed and the position alone, not on who else is in the batch.
    """
    layout = in_pages(table, cache, execution.impl)
    hidden, cache = forward_stored(params, bias, tokens, positions, cache, layout.visible(positions), layout.store, config, execution)
    rows = jnp.arange(len(last))
    return sample_rows(logits(params, hidden[rows, last]), seeds, positions[rows, last], sampling), cache


class OneByOne:
    """Decodes a token of each row a step."""

    window, ahead = 1, 0  # newest tokens of a row that decoding asks for, and tokens of a prompt beyond a chunk that reading asks for
    drafted = accepted = 0

    def __init__(self, params: Params, bias: RouterBias, cache: Cache, config: ModelConfig, execution: Execution):
        self._model, self._static, self._cache = (params, bias), (config, execution), _beside(params, cache)

    def read(self, row: int, start: int, count: int, tokens: Int[np.ndarray, "1 t"], rows: Rows) -> int:
        """Reads the first `count` of some tokens, from position `start` of the sequence in a row; the token drawn after them."""
        positions = start + np.arange(tokens.shape[1], dtype=np.int32)[None]
        return self._run(tokens, positions, np.array([count - 1], np.int32), rows)[0]

    def decode(
        self, newest: Int[np.ndarray, "b w"], known: Int[np.ndarray, " b"], running: Bool[np.ndarray, " b"], rows: Rows
    ) -> list[list[int]]:
        """New tokens of each row, given its newest ones, of which the last is at position `known`; [] where it is not `running`."""
        drawn = self._run(newest, known[:, None], np.zeros(len(known), np.int32), rows)
        return [[token] if of_row else [] for token, of_row in zip(drawn, running, strict=True)]

    def _run(self, tokens: np.ndarray, positions: np.ndarray, last: np.ndarray, rows: Rows) -> list[int]:
        drawn, self._cache = forward_pages(*self._model, tokens, positions, last, *rows, self._cache, *self._static)
        return np.asarray(drawn).tolist()


class Speculating:
    """Decodes 1 to `drafts` + 1 tokens of each row a step: a round of `speculative`. Methods and limits as those of `OneByOne`.

    On the device only hidden states are kept between rounds; tokens and positions come from the host, which has them anyway.
    """

    def __init__(self, params: Params, bias: RouterBias, cache: Cache, config: ModelConfig, execution: Execution, rows: int, drafts: int):
        self._model, self._static = (params, bias), (config, execution, drafts)
        self.window, self.ahead = window_of(config, drafts), modules_used(config, drafts)
        self.drafted = self.accepted = 0
        self.state = _beside(params, new_speculation(cache, rows, config, execution, drafts))
        self._unknown = np.zeros((rows, self.window), np.int32)
        _check_kernel(self.window, execution.impl)

    def read(self, row: int, start: int, count: int, tokens: Int[np.ndarray, "1 t"], rows: Rows) -> int:
        starts = np.full(len(self._unknown), start, np.int32)
        state = self.state._replace(tokens=self._unknown, known=starts)
        place, counts = np.array([row], np.int32), np.array([count], np.int32)
        drawn, self.state = read_prompts(*self._model, state, place, tokens, counts, *rows, *self._static)
        return int(drawn[0])

    def decode(
        self, newest: Int[np.ndarray, "b w"], known: Int[np.ndarray, " b"], running: Bool[np.ndarray, " b"], rows: Rows
    ) -> list[list[int]]:
        state = self.state._replace(tokens=newest, known=known)
        drawn, kept, self.state = speculate_round(*self._model, state, running, *rows, *self._static)
        counts = np.where(running, np.asarray(kept) + 1, 0)
        self.drafted += int(running.sum()) * (drawn.shape[1] - 1)
        self.accepted += int(counts.sum() - running.sum())
        return [row[:count].tolist() for row, count in zip(np.asarray(drawn), counts, strict=True)]


def _check_kernel(tokens: int, impl: str) -> None:
    """Says that attention over so many tokens of a sequence goes without the kernel. Raises NotImplementedError where it was asked for."""
    if tokens > MAX_TOKENS and use_pallas(impl):
        reason = f"{tokens} positions in a round, drafts and modules: the decode kernel takes {MAX_TOKENS}"
        if impl == "pallas":
            raise NotImplementedError(f"{reason}; use impl='auto', or fewer drafts")
        _log.info("impl='auto' reads pages by the reference where there are more: %s", reason)


def _beside(params: Params, state: Any) -> Any:
    """A state placed as the parameters are, which is where a step leaves it: otherwise each program would be compiled for both places."""
    return jax.device_put(state, jax.tree.leaves(params)[0].sharding)
