"""Generation over the latent cache: the prompt once, then one token at a time, nothing computed twice."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, in_rows, init_cache
from dsv3_jax.inference.sampling import Sampling, sample
from dsv3_jax.model.layers import joined, rms_norm
from dsv3_jax.model.mla import KvUp, Store, contiguous
from dsv3_jax.model.transformer import Block, Execution, Params, RouterBias, embed, logits, unrolled
from dsv3_jax.precision.quantize import at_rest as kernel_at_rest


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
    layout = in_rows(cache)
    return forward_stored(params, bias, tokens, positions, cache, layout.visible(positions), layout.store, config, execution)


def forward_prompts(
    params: Params, bias: RouterBias, tokens: Int[Array, "b t"], cache: Cache, config: ModelConfig, execution: Execution
) -> tuple[Float[Array, "b t d"], Cache]:
    """`forward_cached` of the first tokens of every sequence, for which what the cache holds does not matter."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return forward_stored(params, bias, tokens, positions, cache, None, contiguous, config, execution)


def forward_stored(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    cache: Cache,
    mask: Bool[Array, "b t s"] | None,
    store: Store,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "b t d"], Cache]:
    """`forward_cached` over a cache of any layout: `store` writes and reads it, `mask` says which of what it reads a token sees.

    None: the tokens are the first of each sequence, in order, and see one another.
    """
    (out,) = forward_together(params, bias, (MicroBatch(tokens, positions, cache, mask),), store, config, execution)
    return out.hidden, out.cache


class MicroBatch(NamedTuple):
    """New tokens of some sequences. With heads over devices (`Placement.heads`) `tokens` are those of this device."""

    tokens: Int[Array, "here_b here_t"]
    positions: Int[Array, "b t"]
    cache: Cache
    mask: Bool[Array, "b t s"] | None


class Forwarded(NamedTuple):
    """A micro-batch after the final norm, its cache with the new tokens in it, and the fullness of the fullest dispatch buffer."""

    hidden: Float[Array, "here_b here_t d"]
    cache: Cache
    fullness: Float[Array, ""]  # above 1: hidden and cache are wrong, see parallel.expert


def forward_together(
    params: Params, bias: RouterBias, batches: Sequence[MicroBatch], store: Store, config: ModelConfig, execution: Execution
) -> list[Forwarded]:
    """`forward_stored` of several micro-batches, layer by layer: none waits for what another exchanges (V3 sec. 3.4)."""
    layer_bias = {"dense": jnp.zeros((config.num_dense_layers, config.n_routed_experts)), "moe": bias.moe}
    outs = [Forwarded(embed(params, batch.tokens, execution.dtype), batch.cache, jnp.zeros(())) for batch in batches]
    for kind in (kind for kind in Cache._fields if kind in params):
        block, carry = Block(config, execution, kind == "moe"), [(x, getattr(cache, kind), full) for x, cache, full in outs]
        carry = _through_stack(block, params[kind], layer_bias[kind], batches, carry, store)
        outs = [Forwarded(x, out.cache._replace(**{kind: stack}), full) for out, (x, stack, full) in zip(outs, carry, strict=True)]
    return [out._replace(hidden=rms_norm(out.hidden, params["norm"], config.rms_norm_eps)) for out in outs]


_Carry = list[tuple[Array, Any, Array]]


def _through_stack(
    block: Block, stack: Params, bias: Float[Array, "layers e"], batches: Sequence[MicroBatch], carry: _Carry, store: Store
) -> _Carry:
    """Hidden states of the micro-batches, the caches of a stack of layers and the largest fullness, after it.

    The caches of all layers go through the loop as one value, so that a token is written where it stays.
    """

    def layer(carry: _Carry, inputs: tuple) -> tuple[_Carry, None]:
        number, layer_params, layer_bias = inputs
        of_layer = functools.partial(store, number)

        def one(batch: MicroBatch, x: Array, pools: Any, fullest: Array) -> tuple[Array, Any, Array]:
            arguments = (x, layer_bias, batch.positions, pools, batch.mask, of_layer)
            x, pools, fullness = block.apply({"params": layer_params}, *arguments, method=Block.decode)
            return x, pools, jnp.maximum(fullest, fullness)

        return [one(batch, *state) for batch, state in zip(batches, carry, strict=True)], None

    layers = bias.shape[0]
    return jax.lax.scan(layer, carry, (jnp.arange(layers), stack, bias), unroll=unrolled(layers))[0]


KEPT_WIDE = ("router", "scale", "norm")  # used in float32
QUANTIZED = ("kernel", "gate_up_proj", "down_proj", "kv_b_proj")  # in FP8, but of an MTP module's own projection


@functools.partial(jax.jit, static_argnames="execution")
def at_rest(params: Params, execution: Execution) -> Params:
    """Master weights as every use of them would cast, or quantize, them, once: the same numbers, a half or a quarter of the bytes to read.

    Gives nothing to train: kernels in FP8 have no gradients.
    """
    recipe = execution.recipe

    def one(path: tuple[Any, ...], leaf: Array) -> Any:
        *_, module, name = ("", *(part.key for part in path))
        if name in KEPT_WIDE:
            return leaf
        cast = leaf.astype(execution.dtype)
        if not recipe.fp8 or name not in QUANTIZED or module == "eh_proj":
            return cast
        quantized = kernel_at_rest(joined(leaf) if name == "gate_up_proj" else leaf, recipe.weight_tile)
        return KvUp(quantized, cast) if name == "kv_b_proj" else quantized

    return jax.tree_util.tree_map_with_path(one, params)


class Draws(NamedTuple):
    """How a generation draws: token i of every sequence with the key `fold_in(key, i)`."""

    key: PRNGKeyArray
    sampling: Sampling


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="cache")
def prefill(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    cache: Cache,
    draws: Draws,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Int[Array, " b"], Cache]:
    """The token after each prompt; prompts are padded on the right to t tokens, `lengths` are their own."""
    hidden, cache = forward_prompts(params, bias, tokens, cache, config, execution)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return sample(logits(params, last), jax.random.fold_in(draws.key, 0), draws.sampling), cache


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="cache")
def decode_step(
    params: Params,
    bias: RouterBias,
    tokens: Int[Array, " b"],
    lengths: Int[Array, " b"],
    number: Int[Array, ""] | int,
    cache: Cache,
    draws: Draws,
    config: ModelConfig,
    execution: Execution,
) -> tuple[Int[Array, " b"], Cache]:
    """New token `number` (from 1) of prompts of these lengths; `tokens` are those before it."""
    positions = (lengths + number - 1)[:, None]
    hidden, cache = forward_cached(params, bias, tokens[:, None], positions, cache, config, execution)
    return sample(logits(params, hidden[:, 0]), jax.random.fold_in(draws.key, number), draws.sampling), cache


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
    rest = (Draws(key, Sampling(temperature, top_p)), config, execution)
    ends = jnp.asarray(lengths)
    tokens, cache = prefill(params, bias, jnp.asarray(padded), ends, cache, *rest)
    yield np.asarray(tokens)
    for number in range(1, max_new_tokens):
        following, cache = decode_step(params, bias, tokens, ends, number, cache, *rest)
        if number > 1:  # the next step is on its way before this token is looked at: the device does not wait for the host
            yield np.asarray(tokens)
        tokens = following
    if max_new_tokens > 1:
        yield np.asarray(tokens)


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
    """The next power of two from 32, or one and a half of one: prompts of similar length share one compiled program."""
    power = max(32, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power
