"""Speculative decoding: MTP modules draft tokens, the main model verifies them in one pass (V3 sec. 2.2.3; 2211.17192).

A round starts with m known positions: tokens 0..m are there, the main model has seen those before m. Module k at position
m-1 drafts token m+k, given token m-1+k, as in training. Past the last module the last one goes on with its own state in the place of
the one that it was trained on: both predict the same token. The main model then reads token m and the drafts at once.
A draft d is kept with probability min(1, p(d) / q(d)), p the main model's distribution and q the module's; the first one that is
not is replaced by a draw from max(p - q, 0), normalised. What comes out follows p exactly. Greedy decoding is the case of one-hot p and q.

Nothing is rolled back: a cache slot past the known tokens is not visible, and is written again when its token is known. A module's
state at p needs token p+k, which for the last positions was a draft, so modules run over a window of positions that covers them.
Main model and modules have caches of one layout, rows of slots or pages: the same programs serve a fixed batch and the engine.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, Layout, in_rows, init_cache
from dsv3_jax.inference.decode import bucket, forward_stored, pad_prompts
from dsv3_jax.inference.paged import in_pages
from dsv3_jax.inference.sampling import Sampling, draw, keys_at, probabilities, sample_rows
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.transformer import Execution, Params, RouterBias, embed, logits


class Speculation(NamedTuple):
    """State between rounds: `known` is m of each sequence, the windows end at it."""

    cache: Cache
    drafter: Any  # caches of the modules, laid out as those of a stack of layers
    hidden: Float[Array, "b w d"]  # main model, positions m-w..m-1
    tokens: Int[Array, "b w"]  # positions m-w+1..m
    known: Int[Array, " b"]


def modules_used(config: ModelConfig, drafts: int) -> int:
    """MTP modules that so many drafts a round need."""
    return min(drafts, config.num_nextn_predict_layers)


def window_of(config: ModelConfig, drafts: int) -> int:
    """Positions that a module can have to compute again in a round: drafts, one more token, and its distance ahead."""
    return drafts + modules_used(config, drafts)


class Model(NamedTuple):
    """What both models need; `drafts` is the number of tokens drafted a round. All but parameters and bias are static."""

    params: Params
    bias: RouterBias
    config: ModelConfig
    execution: Execution
    drafts: int
    layout: Layout  # of both models' caches

    @property
    def modules(self) -> int:
        """MTP modules that are used."""
        return modules_used(self.config, self.drafts)

    @property
    def window(self) -> int:
        """Positions that a module runs over in a round."""
        return window_of(self.config, self.drafts)


def run_main(
    model: Model, tokens: Int[Array, "b t"], positions: Int[Array, "b t"], cache: Cache, first: bool = False
) -> tuple[Float[Array, "b t d"], Cache]:
    """Hidden states of the main model at `positions`, and its cache; `first`: these are all tokens that there are, from position 0."""
    mask = None if first else model.layout.visible(positions)
    return forward_stored(model.params, model.bias, tokens, positions, cache, mask, model.layout.store, model.config, model.execution)


def run_module(
    model: Model, k: int, hidden: Float[Array, "b t d"], tokens: Int[Array, "b t"], positions: Int[Array, "b t"], caches: Any
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"], Any]:
    """Module k (from 0) at `positions`, given the tokens k+1 ahead of them: block output, normalised output, all modules' caches.

    Positions before the first are done in the last slot, which no token reaches.
    """
    module, params = MTPModule(model.config, model.execution), jax.tree.map(lambda p: p[k], model.params["mtp"])
    positions = jnp.where(positions < 0, model.layout.slots - 1, positions)
    arguments = (
        hidden,
        embed(model.params, tokens, model.execution.dtype),
        model.bias.mtp[k],
        positions,
        caches,
        model.layout.visible(positions),
        functools.partial(model.layout.store, k),
    )
    return module.apply({"params": params}, *arguments, method=MTPModule.decode)


def draft(
    model: Model, state: Speculation, keys: Key[Array, " b"], sampling: Sampling
) -> tuple[Int[Array, "b n"], Float[Array, "b n v"], Any]:
    """Drafts of the tokens after the known ones, the distributions that they were drawn from, and the modules' caches."""
    window, last = model.window, model.modules - 1
    positions = state.known[:, None] + jnp.arange(-window, 0)
    x, normed, tokens, caches = state.hidden, state.hidden, state.tokens, state.drafter
    drafts: list[Array] = []
    chances: list[Array] = []
    for n in range(model.drafts):
        k = min(n, last)
        if n > last:  # the module's own state, one position on: normalised where it stands for the main model's
            x, positions = (normed if last == 0 else x)[:, -1:], positions[:, -1:] + 1
        ahead = tokens[:, k : k + window] if n <= last else tokens[:, -1:]
        x, normed, caches = run_module(model, k, x, ahead, positions, caches)
        chances.append(probabilities(logits(model.params, normed[:, -1]), sampling))
        drafts.append(draw(chances[-1], jax.vmap(jax.random.fold_in, (0, None))(keys, n)))
        tokens = jnp.concatenate([tokens, drafts[-1][:, None]], axis=1)
    return jnp.stack(drafts, 1), jnp.stack(chances, 1), caches


def accept(
    keys: Key[Array, " b"], drafts: Int[Array, "b n"], q: Float[Array, "b n v"], p: Float[Array, "b n+1 v"]
) -> tuple[Int[Array, "b n+1"], Int[Array, " b"]]:
    """Tokens of a round, and how many drafts head them (0..n); one token of the main model follows, the rest is padding."""
    return jax.vmap(_accept)(keys, drafts, q, p)


def _accept(key: PRNGKeyArray, drafts: Array, q: Array, p: Array) -> tuple[Array, Array]:
    n = len(drafts)
    for_drafts, for_last = jax.random.split(key)
    of_draft = lambda chances: chances[jnp.arange(n), drafts]  # noqa: E731
    kept = jax.random.uniform(for_drafts, (n,)) * of_draft(q) < of_draft(p)
    accepted = jnp.cumprod(kept).sum()
    rest = jnp.maximum(p - jnp.pad(q, ((0, 1), (0, 0))), 0.0)[accepted]  # after the last draft: p itself
    # Rounding can leave nothing of p - q although the draft was not kept; p is then as good as q.
    rest = jnp.where(rest.sum() > 0, rest, p[accepted])
    last = jax.random.categorical(for_last, jnp.log(rest)).astype(drafts.dtype)
    return jnp.where(jnp.arange(n + 1) == accepted, last, jnp.pad(drafts, (0, 1))), accepted


def move_on(state: Speculation, hidden: Float[Array, "b t d"], tokens: Int[Array, "b t"], steps: Int[Array, " b"]) -> Speculation:
    """The state `steps` tokens on; `hidden` are positions m.. of the main model, `tokens` are m+1.. ."""

    def along(window: Array, new: Array) -> Array:
        take = steps[:, None] + jnp.arange(window.shape[1])
        return jnp.take_along_axis(jnp.concatenate([window, new], 1), take.reshape(*take.shape, *[1] * (new.ndim - 2)), axis=1)

    return state._replace(hidden=along(state.hidden, hidden), tokens=along(state.tokens, tokens), known=state.known + steps)


def _layout(table: Array | None, cache: Cache, execution: Execution) -> Layout:
    return in_rows(cache) if table is None else in_pages(table, cache, execution.impl)


@functools.partial(jax.jit, static_argnames=("config", "execution", "drafts"), donate_argnames="state")
def speculate_round(
    params: Params,
    bias: RouterBias,
    state: Speculation,
    running: Bool[Array, " b"],
    seeds: UInt32[Array, " b"],
    sampling: Sampling,
    table: Int[Array, "b pages"] | None,
    config: ModelConfig,
    execution: Execution,
    drafts: int,
) -> tuple[Int[Array, "b {drafts}+1"], Int[Array, " b"], Speculation]:
    """One round: tokens, accepted drafts, and the state after it. A sequence that is not `running` stays where it is.

    `table`: the pages of the caches, None where they are rows of slots. What is drawn depends on a sequence's seed and its m alone.
    """
    model = Model(params, bias, config, execution, drafts, _layout(table, state.cache, execution))
    for_draft, for_accept = jax.vmap(jax.random.split, out_axes=1)(keys_at(seeds, state.known))
    proposed, q, drafter = draft(model, state, for_draft, sampling)
    read = jnp.concatenate([state.tokens[:, -1:], proposed], axis=1)
    hidden, cache = run_main(model, read, state.known[:, None] + jnp.arange(drafts + 1), state.cache)
    p = jax.vmap(lambda scores: probabilities(scores, sampling), 1, 1)(logits(params, hidden))
    tokens, accepted = accept(for_accept, proposed, q, p)
    steps = jnp.where(running, accepted + 1, 0)
    return tokens, accepted, move_on(state._replace(cache=cache, drafter=drafter), hidden, tokens, steps)


@functools.partial(jax.jit, static_argnames=("config", "execution", "drafts"), donate_argnames="state")
def read_prompts(
    params: Params,
    bias: RouterBias,
    state: Speculation,
    rows: Int[Array, " r"],
    tokens: Int[Array, "r t"],
    counts: Int[Array, " r"],
    seeds: UInt32[Array, " r"],
    sampling: Sampling,
    table: Int[Array, "r pages"] | None,
    config: ModelConfig,
    execution: Execution,
    drafts: int,
) -> tuple[Int[Array, " r"], Speculation]:
    """Reads `counts` tokens of the prompts in some rows of the state, with the main model and the modules; the token drawn after them.

    `tokens` begin at the rows' m and go on, padded, for as many tokens as there are modules beyond the t' that are read: a module
    needs the tokens ahead. Those that are not known yet lie ahead of the window's positions only, which a round does again.
    Without a `table`, all rows are read, each prompt whole. The state's token m is the next of `tokens`, not the one that was drawn.
    """
    model = Model(params, bias, config, execution, drafts, _layout(table, state.cache, execution))
    t = tokens.shape[1] - model.modules
    positions = state.known[rows][:, None] + jnp.arange(t)
    hidden, cache = run_main(model, tokens[:, :t], positions, state.cache, first=table is None)
    x, drafter = hidden, state.drafter
    for k in range(model.modules):
        x, _, drafter = run_module(model, k, x, tokens[:, k + 1 : k + 1 + t], positions, drafter)
    last = jnp.arange(len(rows)), counts - 1
    drawn = sample_rows(logits(params, hidden[last]), seeds, positions[last], sampling)
    mine = Speculation(cache, drafter, state.hidden[rows], state.tokens[rows], state.known[rows])
    mine = move_on(mine, hidden, tokens[:, 1 : t + 1], counts)
    put = lambda old, new: old.at[rows].set(new)  # noqa: E731
    return drawn, Speculation(cache, drafter, *map(put, state[2:], mine[2:]))


def new_speculation(cache: Cache, rows: int, config: ModelConfig, execution: Execution, drafts: int) -> Speculation:
    """The state of rows that nothing is known of, over an empty cache; the modules get one like it."""
    modules, window = modules_used(config, drafts), window_of(config, drafts)
    drafter = jax.tree.map(lambda a: jnp.zeros((modules, *a.shape[1:]), a.dtype), cache.moe)
    hidden = jnp.zeros((rows, window, config.hidden_size), execution.dtype)
    return Speculation(cache, drafter, hidden, jnp.zeros((rows, window), jnp.int32), jnp.zeros(rows, jnp.int32))


def start(
    params: Params,
    bias: RouterBias,
    prompts: Int[np.ndarray, "b t"],
    lengths: Int[np.ndarray, " b"],
    slots: int,
    seeds: UInt32[Array, " b"],
    sampling: Sampling,
    config: ModelConfig,
    execution: Execution,
    drafts: int,
) -> tuple[Int[Array, " b"], Speculation]:
    """Reads prompts, padded on the right to t, into caches of so many slots; returns the first new token and the state."""
    state = new_speculation(init_cache(config, len(prompts), slots, execution.dtype), len(prompts), config, execution, drafts)
    tokens = np.pad(prompts, ((0, 0), (0, modules_used(config, drafts))))
    rows = np.arange(len(prompts), dtype=np.int32)
    first, state = read_prompts(params, bias, state, rows, tokens, lengths, seeds, sampling, None, config, execution, drafts)
    return first, state._replace(tokens=state.tokens.at[:, -1].set(first))


class Round(NamedTuple):
    """New tokens of each sequence (none for one that is done), and how many drafts were proposed and accepted in all."""

    tokens: list[list[int]]
    proposed: int
    accepted: int


def generate_speculatively(
    params: Params,
    bias: RouterBias,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    execution: Execution,
    *,
    drafts: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: PRNGKeyArray,
) -> Iterator[Round]:
    """Yields rounds until every prompt has `max_new_tokens` new tokens; the caller cuts at an end token.

    The tokens follow the same distribution as those of `decode.generate`; at temperature 0 they are the same up to ties within
    rounding. Raises ValueError as `generate` does, and for a model without MTP modules or fewer than one draft.
    """
    if drafts < 1 or not config.num_nextn_predict_layers:
        raise ValueError(f"{drafts} drafts, {config.num_nextn_predict_layers} MTP modules: speculation needs one of each at least")
    padded, lengths = pad_prompts(prompts, max_new_tokens, config)
    # A round may write `drafts` slots beyond the last token, one round more than is needed may run, and one slot more is nobody's.
    slots, b = bucket(int(lengths.max()) + max_new_tokens + 2 * drafts + 2), len(prompts)
    draws = (jax.random.bits(key, (b,), "uint32"), Sampling(*np.full((2, b), [[temperature], [top_p]], np.float32)))
    first, state = start(params, bias, padded, lengths, slots, *draws, config, execution, drafts)
    yield Round([[token] for token in np.asarray(first).tolist()], 0, 0)
    missing = np.full(b, max_new_tokens - 1)
    after: tuple[Array, Array, Speculation] | None = None
    while (running := missing > 0).any():
        drawn, kept, state = after or speculate_round(params, bias, state, running, *draws, None, config, execution, drafts)
        if missing.max() > 1:  # the next round is on its way before this one is looked at; a sequence that this one ends runs once more
            after = speculate_round(params, bias, state, running, *draws, None, config, execution, drafts)
        counts = np.where(running, np.minimum(np.asarray(kept) + 1, missing), 0)
        accepted = np.asarray(kept)[running].sum()
        yield Round(
            [row[:n].tolist() for row, n in zip(np.asarray(drawn), counts, strict=True)], drafts * int(running.sum()), int(accepted)
        )
        missing = missing - counts
