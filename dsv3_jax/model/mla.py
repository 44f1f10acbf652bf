"""Multi-head latent attention (V3 sec. 2.1.1, eq. 1-11).

Two forms of one function. The training form expands keys and values from the latent and attends as
usual. The decode form never expands them: `W_UK` is absorbed into the query and `W_UV` applied after the
softmax, so that attention runs over the cache itself, `kv_lora_rank + qk_rope_head_dim` numbers a token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import Attended, attend
from dsv3_jax.model.layers import Linear, RMSNorm, kernel_param, rope, softmax_scale
from dsv3_jax.parallel.heads import Heads
from dsv3_jax.precision.linear import Prepared, linear
from dsv3_jax.precision.policy import AFTER_ATTENTION, BF16, Recipe
from dsv3_jax.precision.quantize import BLOCK, Kernel, Quantized, kernel_shape
from pallas_kernels.mla_decode import mla_decode

# The public model normalises latents with the default eps of its RMSNorm class, not with rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class Latent(NamedTuple):
    """What a token leaves in the cache."""

    c_kv: Float[Array, "b s r"]  # normalised, kv_lora_rank wide
    k_r: Float[Array, "b s p"]  # rotated, qk_rope_head_dim wide, shared by all heads


class InPages(NamedTuple):
    """Latents where they lie, to be read through a page table; the queries are the last tokens of each sequence."""

    c_kv: Float[Array, "pages size r"]
    k_r: Float[Array, "pages size p"]
    table: Int[Array, "b n"]
    lengths: Int[Array, " b"]  # with the queries


class KvUp(NamedTuple):
    """`kv_b_proj` as the training form and the absorbed one read it: the same, but at rest in FP8, where the first is quantized."""

    expands: Kernel  # [r, hnv]
    absorbed: Float[Array, "r hnv"]


def expand(
    c_kv: Float[Array, "b s r"], kv_b_proj: Float[Array, "r hnv"] | Quantized, heads: int, nope: int, recipe: Recipe = BF16
) -> tuple[Float[Array, "b s h n"], Float[Array, "b s h v"]]:
    """Content keys `c_kv W_UK`, `nope` wide, and values `c_kv W_UV` of all heads (eq. 2, 5)."""

    def product(kernel: Kernel) -> Array:
        return linear(c_kv, kernel, recipe).reshape(*c_kv.shape[:2], heads, -1)

    width = kernel_shape(kv_b_proj)[1] // heads
    if isinstance(kv_b_proj, Quantized) or nope % BLOCK or width % BLOCK:
        k_c, v = jnp.split(product(kv_b_proj), [nope], axis=-1)
    else:  # no block of weights has columns of both, and values need no copy to lie by themselves
        parts = jnp.split(kv_b_proj.reshape(-1, heads, width), [nope], axis=-1)
        k_c, v = (product(part.reshape(len(part), -1)) for part in parts)
    return k_c, v


class Queries(NamedTuple):
    """Content and rotated queries of every head (eq. 6-9)."""

    projected: Float[Array, "b t h k"]  # the first qk_nope_head_dim columns are content
    rotated: Float[Array, "b t h p"]

    @property
    def content(self) -> Float[Array, "b t h n"]:
        return self.projected[..., : self.projected.shape[-1] - self.rotated.shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_parts(projected: Array, positions: Array, config: ModelConfig) -> Queries:
    """Queries of a projection. Their gradient is both parts side by side, where autodiff adds them up, each filled with zeros."""
    return Queries(projected, rope(projected[..., config.qk_nope_head_dim :], positions, config))


def _of_parts(config: ModelConfig, positions: Array, gradient: Queries) -> tuple[Array, None]:
    _, turned_back = jax.vjp(lambda x: rope(x, positions, config), gradient.rotated)  # linear: it does not matter where
    content, unread = jnp.split(gradient.projected, [config.qk_nope_head_dim], axis=-1)
    return jnp.concatenate([content, unread + turned_back(gradient.rotated)[0]], -1), None


_in_parts.defvjp(lambda projected, positions, config: (_in_parts(projected, positions, config), positions), _of_parts)


def expanded_attention(
    queries: Queries,
    latent: Latent,
    kv_b_proj: Float[Array, "r hnv"] | Quantized,
    scale: float,
    segment_ids: Int[Array, "b t"] | None,
    impl: str,
    recipe: Recipe = BF16,
) -> Attended:
    """Training form: keys `[c_kv W_UK ; k_r]` and values `c_kv W_UV` for every head (eq. 4-10)."""
    _, _, heads, width = queries.projected.shape
    k_c, v = expand(latent.c_kv, kv_b_proj, heads, width - latent.k_r.shape[-1], recipe)
    rotated = queries.rotated, latent.k_r
    return attend(queries.projected, k_c, v, scale=scale, rotated=rotated, segment_ids=segment_ids, impl=impl, recipe=recipe)


def absorbed_attention(
    queries: Queries,
    cache: Latent | InPages,
    kv_b_proj: Float[Array, "r hnv"],
    scale: float,
    mask: Bool[Array, "b t s"],
) -> Float[Array, "b t h v"]:
    """Decode form: `softmax((q_c W_UK^T) c_kv + q_r k_r) c_kv W_UV` where `mask` is True (V2 2405.04434 sec. 2.1.2).

    In pages, the kernel reads what each token may see, which is all up to itself, and no mask.
    """
    q_c, q_r = queries.content, queries.rotated
    heads, nope = q_c.shape[-2:]
    kv_up = kv_b_proj.astype(q_c.dtype).reshape(kv_b_proj.shape[0], heads, -1)
    w_uk, w_uv = jnp.split(kv_up, [nope], axis=-1)
    q_latent = jnp.einsum("bthn,rhn->bthr", q_c, w_uk)
    if isinstance(cache, InPages):
        o_latent = mla_decode(jnp.concatenate([q_latent, q_r], -1), *cache, scale, impl="pallas")
    else:
        o_latent = _latent_attention(q_latent, q_r, cache, scale, mask)
    return jnp.einsum("bthr,rhv->bthv", o_latent, w_uv)


def _latent_attention(q_latent: Array, q_r: Array, cache: Latent, scale: float, mask: Array) -> Array:
    """Averages of c_kv, with float32 scores. Tokens and heads are the rows of one product a sequence: nothing has to be transposed."""
    b, t, heads, _ = q_latent.shape
    scores = jnp.einsum("bqr,bsr->bqs", q_latent.reshape(b, t * heads, -1), cache.c_kv, preferred_element_type=jnp.float32)
    scores += jnp.einsum("bqp,bsp->bqs", q_r.reshape(b, t * heads, -1), cache.k_r, preferred_element_type=jnp.float32)
    visible = jnp.where(mask[:, :, None], scores.reshape(b, t, heads, -1) * scale, -jnp.inf)
    probabilities = jax.nn.softmax(visible, axis=-1).astype(q_latent.dtype)
    return jnp.einsum("bqs,bsr->bqr", probabilities.reshape(b, t * heads, -1), cache.c_kv).reshape(q_latent.shape)


# Writes the new entries of a layer into the cache of a stack, of whatever layout; returns it, and all of the layer as attention reads it.
Store = Callable[[Any, Any, Latent, Array], tuple[Any, Latent | InPages]]  # the layer's number comes first
LayerStore = Callable[[Any, Latent, Array], tuple[Any, Latent | InPages]]  # of one layer


def contiguous(layer: Int[Array, ""] | int, cache: Latent, new: Latent, positions: Int[Array, "b t"]) -> tuple[Latent, Latent]:
    """The `Store` of a cache with a row of slots for each layer and sequence: entries are written at `positions` of each."""
    rows = jnp.arange(positions.shape[0])[:, None]
    stack = Latent(*(old.at[layer, rows, positions].set(fresh.astype(old.dtype)) for old, fresh in zip(cache, new, strict=True)))
    return stack, Latent(*(part[layer] for part in stack))


class MLA(nn.Module):
    """Parameters of MLA; `__call__` is the training form, `decode` the absorbed form over a cache."""

    config: ModelConfig
    impl: str
    recipe: Recipe = BF16
    heads: Heads | None = None  # the devices that other heads are on; `config` has the number of those here

    def setup(self) -> None:
        c = self.config
        std, heads = c.initializer_range, c.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(heads * c.qk_head_dim, std, self.recipe)
        else:
            self.q_a_proj = Linear(c.q_lora_rank, std, self.recipe)
            self.q_a_layernorm = RMSNorm(LATENT_NORM_EPS)
            self.q_b_proj = Linear(heads * c.qk_head_dim, std, self.recipe)
        self.kv_a_proj_with_mqa = Linear(c.kv_lora_rank + c.qk_rope_head_dim, std, self.recipe)
        self.kv_a_layernorm = RMSNorm(LATENT_NORM_EPS)
        up_shape = (c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        up = kernel_param(self, "kv_b_proj", std, up_shape, KvUp)
        self.kv_up = up if isinstance(up, KvUp) else KvUp(up, up)
        self.o_proj = Linear(c.hidden_size, std, self.recipe, AFTER_ATTENTION)

    def __call__(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None) -> Array:
        queries, latent = self.queries(x, positions), self.latent(x, positions)
        scale = softmax_scale(self.config)
        return self._project(*expanded_attention(queries, latent, self.kv_up.expands, scale, segment_ids, self.impl, self.recipe))

    def decode(
        self,
        x: Float[Array, "here_b here_t d"],
        positions: Int[Array, "b t"],
        cache: Any,
        mask: Bool[Array, "b t s"] | None,
        store: LayerStore,
    ) -> tuple[Float[Array, "here_b here_t d"], Any]:
        """Writes the new tokens into the cache, then attends over it. `mask[b, t, s]`: may token t see cache slot s.

        Without a mask the new tokens are the first of each sequence and see one another only: the training form, which
        needs fewer operations where there are as many queries as keys. With heads on other devices too, x has this
        device's share of the tokens; positions, mask and cache have all of the group's.
        """
        queries = self.queries(x, positions)
        new, scale = self.latent(x, positions), softmax_scale(self.config)
        cache, latents = store(cache, new, positions)
        if mask is None:
            out = expanded_attention(queries, new, self.kv_up.expands, scale, None, self.impl, self.recipe).out
        else:
            out = absorbed_attention(queries, latents, self.kv_up.absorbed, scale, mask)
        return self._project(out), cache

    def queries(self, x: Float[Array, "b_own t_own d"], positions: Int[Array, "b t"]) -> Queries:
        """Where devices share heads, x is the part of the tokens here."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(self._of_group(x))
        else:
            q = self.q_b_proj(self._of_group(self.q_a_layernorm(checkpoint_name(self.q_a_proj(x), "q_latent"))))
        return _in_parts(q.reshape(*q.shape[:2], c.num_attention_heads, c.qk_head_dim), positions, c)

    def latent(self, x: Float[Array, "b_own t_own d"], positions: Int[Array, "b t"]) -> Latent:
        """What the tokens leave in the cache (eq. 1, 3)."""
        compressed = self._of_group(checkpoint_name(self.kv_a_proj_with_mqa(x), "kv_latent"))
        c_kv, k_r = jnp.split(compressed, [self.config.kv_lora_rank], axis=-1)
        return Latent(self.kv_a_layernorm(c_kv), rope(k_r[:, :, None], positions, self.config)[:, :, 0])

    def _project(self, out: Array, prepared: Prepared | None = None) -> Array:
        projected = self.o_proj(out.reshape(*out.shape[:2], -1), prepared)
        return self.heads.scatter(projected) if self.heads else projected

    def _of_group(self, x: Array) -> Array:
        """A value of each token here as one of each token of the devices that share the heads."""
        return self.heads.gather(x) if self.heads else x
