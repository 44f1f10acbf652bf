"""Attention with keys and values of its own, for groups of heads, in the place of MLA: MHA, GQA (2305.13245) and MQA (1911.02150).

A model whose configuration is a `GroupedConfig` has it in every layer; the rest of the model, and its training, stay as they are.
For studies: there is no cache for it, so such a model is trained and evaluated but does not generate.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import attend
from dsv3_jax.model.layers import Linear, rope
from dsv3_jax.model.transformer import self_attention
from dsv3_jax.precision.policy import AFTER_ATTENTION, Recipe
from dsv3_jax.training.accounting import parameter_parts

WIDTHS = 8  # heads are a multiple of it wide: fused attention on GPUs wants that


@dataclasses.dataclass(frozen=True)
class GroupedConfig(ModelConfig):
    """Heads are v_head_dim wide, and as much of a query and a key is rotated; MLA's ranks and qk_nope_head_dim mean nothing."""

    num_key_value_heads: int = 1  # divides num_attention_heads


class GroupedAttention(nn.Module):
    """Every group of heads shares one key and one value."""

    config: GroupedConfig
    impl: str
    recipe: Recipe

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None) -> Array:
        c = self.config
        heads, groups, width = c.num_attention_heads, c.num_key_value_heads, c.v_head_dim

        def project(name: str, count: int) -> Array:
            return Linear(count * width, c.initializer_range, self.recipe, name=name)(x).reshape(*x.shape[:2], count, width)

        q, k, v = project("q_proj", heads), project("k_proj", groups), project("v_proj", groups)
        k, v = (jnp.repeat(a, heads // groups, axis=2) for a in (rope(k, positions, c), v))
        q = rope(q, positions, c)
        out, prepared = attend(q, k, v, scale=width**-0.5, segment_ids=segment_ids, impl=self.impl, recipe=self.recipe)
        return Linear(c.hidden_size, c.initializer_range, self.recipe, AFTER_ATTENTION, name="o_proj")(
            out.reshape(*x.shape[:2], -1), prepared
        )


@self_attention.register
def _(config: GroupedConfig, impl: str, recipe: Recipe) -> nn.Module:
    return GroupedAttention(config, impl, recipe)


def grouped(model: ModelConfig, groups: int) -> GroupedConfig:
    """The model with so many keys and values a token in MLA's place; heads as wide as makes the parameters nearest to MLA's."""
    parameters = next(part.parameters // part.layers for part in parameter_parts(model) if part.name == "attention")
    of_width = 2 * model.hidden_size * (model.num_attention_heads + groups)
    width = WIDTHS * max(1, round(parameters / of_width / WIDTHS))
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return GroupedConfig(**fields | {"num_key_value_heads": groups, "v_head_dim": width, "qk_rope_head_dim": width})
