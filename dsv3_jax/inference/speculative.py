"""Speculative decoding: MTP modules draft tokens, the main model verifies them in one pass (V3 sec. 2.2.3; 2211.17192).

A round starts with m known positions: tokens 0..m are there, the main model has seen those before m. Module k at position
m-1 drafts token m+k, given token m-1+k, as in training. Past the last module the last one goes on with its own state in the place of
the one that it was trained on: both predict the same token. The main model then reads token m and the drafts at once.
A draft d is kept with probability min(1, p(d) / q(d)), p the main model's distribution and q the module's; the first one that is
not is replaced by a draw from max(p - q, 0), normalised. What comes out follows p exactly. Greedy decoding is the case of one-hot p and q.

Nothing is rolled back: a cache slot past the known tokens is not visible, and is written again when its token is known. A module's
state at p needs token p+k, which for the last positions was a draft, so modules run over a window of positions that covers them.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, init_cache
from dsv3_jax.inference.decode import bucket, forward_cached, forward_prompts, pad_prompts
from dsv3_jax.inference.sampling import Sampling, probabilities, sample
from dsv3_jax.model.mla import Latent, contiguous
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.transformer import Execution, Params, RouterBias, embed, logits


class Speculation(NamedTuple):
    """State between rounds: `known` is m of each sequence, the windows end at it."""

    cache: Cache
    drafter: Latent  # caches of the modules [modules, B, S, ...]
    hidden: Float[Array, "b w d"]  # main model, positions m-w..m-1
    tokens: Int[Array, "b w"]  # positions m-w+1..m
    known: Int[Array, " b"]


class Model(NamedTuple):
    """What both models need; `drafts` is the number of tokens drafted a round. The last three are static."""

    params: Params
    bias: RouterBias
    config: ModelConfig
    execution: Execution
    drafts: int

    @property
    def modules(self) -> int:
        """MTP modules that are used."""
        return min(self.drafts, self.config.num_nextn_predict_layers)

    @property
    def window(self) -> int:
        """Positions that a module can have to compute again in a round: drafts, one more token, and its distance ahead."""
        return self.drafts + self.modules


def run_module(
    model: Model, k: int, hidden: Float[Array, "b t d"], tokens: Int[Array, "b t"], positions: Int[Array, "b t"], caches: Latent
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"], Latent]:
    """Module k (from 0) at `positions`, given the tokens k+1 ahead of them: block output, normalised output, all modules' caches.

    Positions before the first are done in the cache's last slot, which no token reaches.
    """
    module, params = MTPModule(model.config, model.execution), jax.tree.map(lambda p: p[k], model.params["mtp"])
    slots = caches.c_kv.shape[2]
    positions = jnp.where(positions < 0, slots - 1, positions)
    mask = jnp.arange(slots) <= positions[:, :, None]
    arguments = (
        hidden,
        embed(model.params, tokens, model.execution.dtype),
        model.bias.mtp[k],
        positions,
        caches,
        mask,
        functools.partial(contiguous, k),
    )
    return module.apply({"params": params}, *arguments, method=MTPModule.decode)


def draft(
    model: Model, state: Speculation, key: PRNGKeyArray, sampling: Sampling
) -> tuple[Int[Array, "b n"], Float[Array, "b n v"], Latent]:
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
        scores = logits(model.params, normed[:, -1])
        drafts.append(sample(scores, jax.random.fold_in(key, n), sampling))
        chances.append(probabilities(scores, sampling))
        tokens = jnp.concatenate([tokens, drafts[-1][:, None]], axis=1)
    return jnp.stack(drafts, 1), jnp.stack(chances, 1), caches


def accept(
    key: PRNGKeyArray, drafts: Int[Array, "b n"], q: Float[Array, "b n v"], p: Float[Array, "b n+1 v"]
) -> tuple[Int[Array, "b n+1"], Int[Array, " b"]]:
    """Tokens of a round, and how many drafts head them (0..n); one token of the main model follows, the rest is padding."""
    n = drafts.shape[1]
    of_draft = lambda chances: jnp.take_along_axis(chances[:, :n], drafts[:, :, None], axis=2)[:, :, 0]  # noqa: E731
    for_drafts, for_last = jax.random.split(key)
    kept = jax.random.uniform(for_drafts, drafts.shape) * of_draft(q) < of_draft(p)
    accepted = jnp.cumprod(kept, axis=1).sum(1)
    at_end = lambda chances: jnp.take_along_axis(chances, accepted[:, None, None], axis=1)[:, 0]  # noqa: E731
    rest = jnp.maximum(at_end(p) - at_end(jnp.pad(q, ((0, 0), (0, 1), (0, 0)))), 0.0)  # after the last draft: p itself
    # Rounding can leave nothing of p - q although the draft was not kept; p is then as good as q.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, at_end(p))
    last = jax.random.categorical(for_last, jnp.log(rest), axis=-1).astype(jnp.int32)
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(n + 1) == accepted[:, None], last[:, None], padded), accepted


@functools.partial(jax.jit, static_argnames=("config", "execution", "drafts"), donate_argnames="state")
def speculate_round(
    params: Params,
    bias: RouterBias,
    state: Speculation,
    running: Bool[Array, " b"],
    key: PRNGKeyArray,
    sampling: Sampling,
    config: ModelConfig,
    execution: Execution,
    drafts: int,
) -> tuple[Int[Array, "b {drafts}+1"], Int[Array, " b"], Speculation]:
    """One round: tokens, accepted drafts, and the state after it. A sequence that is not `running` stays where it is."""
    model = Model(params, bias, config, execution, drafts)
    for_draft, for_accept = jax.random.split(key)
    proposed, q, drafter = draft(model, state, for_draft, sampling)
    read = jnp.concatenate([state.tokens[:, -1:], proposed], axis=1)
    hidden, cache = forward_cached(params, bias, read, state.known[:, None] + jnp.arange(drafts + 1), state.cache, config, execution)
    p = jax.vmap(lambda scores: probabilities(scores, sampling), 1, 1)(logits(params, hidden))
    tokens, accepted = accept(for_accept, proposed, q, p)
    moved = jnp.where(running, accepted + 1, 0)
    take = moved[:, None] + jnp.arange(model.window)
    hidden = jnp.take_along_axis(jnp.concatenate([state.hidden, hidden], 1), take[:, :, None], axis=1)
    window = jnp.take_along_axis(jnp.concatenate([state.tokens, tokens], 1), take, axis=1)
    return tokens, accepted, Speculation(cache, drafter, hidden, window, state.known + moved)


@functools.partial(jax.jit, static_argnames=("config", "execution", "drafts"), donate_argnames="cache")
def start(
    params: Params,
    bias: RouterBias,
    prompts: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    cache: Cache,
    key: PRNGKeyArray,
    sampling: Sampling,
    config: ModelConfig,
    execution: Execution,
    drafts: int,
) -> tuple[Int[Array, " b"], Speculation]:
    """Reads prompts, padded on the right to t, with the main model and the modules; returns the first new token and the state."""
    model, t = Model(params, bias, config, execution, drafts), prompts.shape[1]
    positions = jnp.broadcast_to(jnp.arange(t), prompts.shape)
    hidden, cache = forward_prompts(params, bias, prompts, cache, config, execution)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = sample(logits(params, last), key, sampling)
    known = jnp.pad(prompts, ((0, 0), (0, model.modules))).at[jnp.arange(len(lengths)), lengths].set(first)
    x, drafter = hidden, jax.tree.map(lambda a: jnp.zeros((model.modules, *a.shape[1:]), a.dtype), cache.moe)
    for k in range(model.modules):
        x, _, drafter = run_module(model, k, x, known[:, k + 1 : k + 1 + t], positions, drafter)
    back = lengths[:, None] + jnp.arange(-model.window, 0)
    window = jnp.take_along_axis(hidden, jnp.maximum(back, 0)[:, :, None], axis=1)
    tokens = jnp.take_along_axis(known, jnp.maximum(back + 1, 0), axis=1)
    return first, Speculation(cache, drafter, window, tokens, lengths)


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
    # A round may write `drafts` slots beyond the last token, and one slot more is nobody's.
    slots = bucket(int(lengths.max()) + max_new_tokens + drafts + 1)
    cache, settings = init_cache(config, len(prompts), slots, execution.dtype), (Sampling(temperature, top_p), config, execution, drafts)
    first, state = start(params, bias, jnp.asarray(padded), jnp.asarray(lengths), cache, jax.random.fold_in(key, 0), *settings)
    yield Round([[token] for token in np.asarray(first).tolist()], 0, 0)
    missing, number = np.full(len(prompts), max_new_tokens - 1), 1
    while (running := missing > 0).any():
        drawn, kept, state = speculate_round(params, bias, state, jnp.asarray(running), jax.random.fold_in(key, number), *settings)
        counts = np.where(running, np.minimum(np.asarray(kept) + 1, missing), 0)
        accepted = np.asarray(kept)[running].sum()
        yield Round(
            [row[:n].tolist() for row, n in zip(np.asarray(drawn), counts, strict=True)], drafts * int(running.sum()), int(accepted)
        )
        missing, number = missing - counts, number + 1
