"""The latent cache: for every layer and token the compressed key-value `c_kv` and the rotated key `k_r` (V3 sec. 2.1.1)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mla import Latent, Store, contiguous


class Cache(NamedTuple):
    """Latents of the dense and of the MoE layers, `c_kv` [layers, B, S, kv_lora_rank] and `k_r` [layers, B, S, rope]; or `paged.Pages`."""

    dense: Any
    moe: Any


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str) -> Cache:
    """An empty cache with `length` slots a sequence."""

    def latent(layers: int) -> Latent:
        shape = (layers, batch, length)
        return Latent(jnp.zeros((*shape, config.kv_lora_rank), dtype), jnp.zeros((*shape, config.qk_rope_head_dim), dtype))

    return Cache(latent(config.num_dense_layers), latent(config.num_moe_layers))


class Layout(NamedTuple):
    """How a cache is written and read, and the slots that its `store` shows of a sequence."""

    store: Store
    slots: int

    def visible(self, positions: Int[Array, "b t"]) -> Bool[Array, "b t s"]:
        """The slots that tokens at these positions see: those up to their own. What later ones hold does not matter."""
        return jnp.arange(self.slots) <= positions[:, :, None]


def in_rows(cache: Cache) -> Layout:
    """The layout of `init_cache`."""
    return Layout(contiguous, cache.moe.c_kv.shape[2])
