"""Generation over the latent cache: the prompt once, then one token at a time, nothing computed twice."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, init_cache
from dsv3_jax.inference.sampling import Sampling, sample
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import Store, contiguous
from dsv3_jax.model.transformer import Block, Execution, Params, RouterBias, embed, logits


def forward_cached(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    cache: Cache,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "b t d"], Cache]:
    """Hidden states of new tokens (after the final norm), and the cache with them written in.

    A token sees the cache slots up to its own position; what later slots hold does not matter.
    """
    mask = jnp.arange(cache.moe.c_kv.shape[2]) <= positions[:, :, None]
    return forward_stored(params, bias, tokens, positions, cache, mask, contiguous, config, execution)


def forward_stored(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    cache: Cache,
    mask: Bool[Array, "b t s"],
    store: Store,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "b t d"], Cache]:
    """`forward_cached` over a cache of any layout: `store` writes and reads it, `mask` says which of what it reads a token sees."""
    x = embed(params, tokens, execution.dtype)
    layer_bias = {"dense": jnp.zeros((config.num_dense_layers, config.n_routed_experts)), "moe": bias.moe}
    new: dict[str, Any] = {}
    for kind, latent in cache._asdict().items():
        new[kind] = latent
        if kind in params:
            block = Block(config, execution, kind == "moe")

            def layer(x: Array, inputs: tuple, block: Block = block) -> tuple[Array, Any]:
                layer_params, bias_row, layer_cache = inputs
                return block.apply({"params": layer_params}, x, bias_row, positions, layer_cache, mask, store, method=Block.decode)

            x, new[kind] = jax.lax.scan(layer, x, (params[kind], layer_bias[kind], latent))
    return rms_norm(x, params["norm"], config.rms_norm_eps), Cache(**new)


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="cache")
def prefill(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    cache: Cache,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "b v"], Cache]:
    """Scores of the token after each prompt; prompts are padded on the right to t tokens, `lengths` are their own."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = forward_cached(params, bias, tokens, positions, cache, config, execution)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return logits(params, last), cache


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="cache")
def decode_step(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, " b"],
    positions: Int[Array, " b"],
    cache: Cache,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "b v"], Cache]:
    """Scores of the token after `tokens`, which sit at `positions`."""
    hidden, cache = forward_cached(params, bias, tokens[:, None], positions[:, None], cache, config, execution)
    return logits(params, hidden[:, 0]), cache


_sample = jax.jit(sample)


def generate(
    params: Params,
    bias: RouterBias,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    execution: Execution,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: PRNGKeyArray,
) -> Iterator[Int[np.ndarray, " b"]]:
    """Yields the next token of every prompt, `max_new_tokens` times; the caller stops at an end token.

    Raises ValueError when a prompt is empty, or with the new tokens longer than `max_position_embeddings`.
    """
    padded, lengths = pad_prompts(prompts, max_new_tokens, config)
    slots = bucket(int(lengths.max()) + max_new_tokens)
    cache = init_cache(config, len(prompts), max(slots, padded.shape[1]), execution.dtype)
    scores, cache = prefill(params, bias, jnp.asarray(padded), jnp.asarray(lengths), cache, config, execution)
    for i in range(max_new_tokens):
        tokens = _sample(scores, jax.random.fold_in(key, i), Sampling(temperature, top_p))
        yield np.asarray(tokens)
        if i + 1 < max_new_tokens:
            scores, cache = decode_step(params, bias, tokens, jnp.asarray(lengths + i), cache, config, execution)


def pad_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, " b"]]:
    """Prompts padded on the right to a bucket, and their lengths. Raises ValueError for those that `generate` refuses."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    limit = config.max_position_embeddings
    if lengths.min() == 0 or lengths.max() + max_new_tokens > limit:
        raise ValueError(f"prompt of {lengths.min()}..{lengths.max()} tokens and {max_new_tokens} new ones must lie in 1..{limit} together")
    padded = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def bucket(length: int) -> int:
    """The next power of two from 32: prompts of similar length share one compiled program."""
    return max(32, 1 << (length - 1).bit_length())
