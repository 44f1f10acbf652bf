"""Tensor parallelism over attention heads, sequence parallelism outside attention (V3 sec. 3.4).

Every device of a group has some of the heads and, outside attention, some of the group's tokens. MLA needs little traffic for that:
what is gathered is not the hidden state of a token but its compressed query and latent, `q_lora_rank + kv_lora_rank + qk_rope_head_dim`
numbers of V3's 2112 against 7168. The output projection gives a sum over heads, which is scattered back to the tokens.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Heads:
    """A group of `ways` devices along a mesh axis; `dim` of [b, t, ...] is what its tokens are cut along: 0 rows, 1 positions."""

    axis: str
    ways: int
    dim: int

    def of_one_device(self, config: ModelConfig) -> ModelConfig:
        """The configuration of attention as one device of the group runs it."""
        return dataclasses.replace(config, num_attention_heads=config.num_attention_heads // self.ways)

    def gather(self, x: Float[Array, "b t d"]) -> Float[Array, "all_b all_t d"]:
        """This device's tokens to those of the group."""
        return jax.lax.all_gather(x, self.axis, axis=self.dim, tiled=True)

    def scatter(self, x: Float[Array, "all_b all_t d"]) -> Float[Array, "b t d"]:
        """The group's tokens, summed over its devices, to this device's."""
        return jax.lax.psum_scatter(x, self.axis, scatter_dimension=self.dim, tiled=True)
