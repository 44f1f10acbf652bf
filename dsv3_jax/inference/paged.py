"""A paged latent cache: sequences of different length share one pool of pages (2309.06180), in the activations' dtype or FP8.

Page `table[b, i]` holds positions i * page_size to (i + 1) * page_size - 1 of sequence b. Page 0 belongs to nobody: padding is
written there. In FP8, `c_kv` is E4M3 with one float32 scale for each token and 128 channels, 1x128 tiles as everywhere in the recipe
(V3 sec. 3.3.2); `k_r`, which carries the positions, stays as it is. All shapes are fixed by the pool and the table.
"""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, Layout
from dsv3_jax.model.mla import InPages, Latent, Store
from dsv3_jax.precision.quantize import BLOCK, Quantized, dequantize, quantize
from pallas_kernels.backend import use_pallas
from pallas_kernels.mla_decode import MAX_TOKENS, unsupported

_log = logging.getLogger(__name__)

TILE = (1, BLOCK)
NOBODY = 0  # the page that padding is written to


class Pages(NamedTuple):
    """The pools of a stack of layers; `scales` is None unless `c_kv` is E4M3."""

    c_kv: Array  # [layers, pages, page_size, kv_lora_rank]
    scales: Float[Array, "layers pages size tiles"] | None
    k_r: Array  # [layers, pages, page_size, rope]


def init_pages(config: ModelConfig, pages: int, page_size: int, dtype: str, fp8: bool) -> Cache:
    """An empty pool for every layer, `pages` with the one that is nobody's; `dtype` is that of activations."""

    def pool(layers: int) -> Pages:
        shape, r = (layers, pages, page_size), config.kv_lora_rank
        scales = jnp.ones((*shape, -(-r // BLOCK))) if fp8 else None
        return Pages(jnp.zeros((*shape, r), "float8_e4m3fn" if fp8 else dtype), scales, jnp.zeros((*shape, config.qk_rope_head_dim), dtype))

    return Cache(pool(config.num_dense_layers), pool(config.num_moe_layers))


def in_pages(table: Int[Array, "b n"], cache: Cache, impl: str) -> Layout:
    """The layout of `init_pages`, for sequences with these pages."""
    return Layout(paged(table, impl), table.shape[1] * cache.moe.k_r.shape[2])


def paged(table: Int[Array, "b n"], impl: str = "reference") -> Store:
    """The `Store` of a pool: writes new entries to the pages of each sequence, whose positions follow one another.

    Attention then reads all pages of a sequence in the order of positions or, by `impl`, leaves them to the kernel.
    """

    def store(layer: Array | int, pool: Pages, new: Latent, positions: Array) -> tuple[Pages, Latent | InPages]:
        size = pool.k_r.shape[2]
        place = (layer, jnp.take_along_axis(table, positions // size, axis=1), positions % size)
        fresh = Pages(new.c_kv, None, new.k_r)
        if pool.scales is not None:
            low = quantize(new.c_kv, TILE)
            fresh = Pages(low.values, low.scales, new.k_r)
        pool = jax.tree.map(lambda old, one: old.at[place].set(one.astype(old.dtype)), pool, fresh)
        if _kernel_reads(impl, pool, positions.shape[1]):
            return pool, _in_place(pool, layer, table, positions)
        mine = jax.tree.map(lambda pages: pages[layer, table].reshape(table.shape[0], -1, pages.shape[-1]), pool)
        c_kv = mine.c_kv if mine.scales is None else dequantize(Quantized(mine.c_kv, mine.scales, TILE), new.c_kv.dtype.name)
        return pool, Latent(c_kv, mine.k_r)

    return store


def _kernel_reads(impl: str, pool: Pages, tokens: int) -> bool:
    """Whether the Pallas kernel reads this pool. It is for decoding: a chunk of a prompt has more tokens than it takes.

    Raises NotImplementedError where "pallas" asks for what the kernel cannot do; "auto" logs why it does without.
    """
    if tokens > MAX_TOKENS or not use_pallas(impl):
        return False
    reason = unsupported(tokens, pool.c_kv, pool.k_r)
    if reason and impl == "pallas":
        raise NotImplementedError(f"{reason}; use impl='auto'")
    if reason:
        _log.info("impl='auto' reads pages by the reference: %s", reason)
    return not reason


def _in_place(pool: Pages, layer: Array | int, table: Array, positions: Array) -> InPages:
    """A layer's pages as places in the stack of all layers: nothing is cut out of it."""
    c_kv, k_r = (part.reshape(-1, *part.shape[2:]) for part in (pool.c_kv, pool.k_r))
    return InPages(c_kv, k_r, (table + layer * pool.k_r.shape[1]).astype(jnp.int32), (positions[:, -1] + 1).astype(jnp.int32))
