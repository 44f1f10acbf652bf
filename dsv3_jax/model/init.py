"""Parameters of a whole model: their shapes, declared by the Linen modules, and their first values (V3 sec. 4.2)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.transformer import Block, Execution, Params, RouterBias, TokenContext
from dsv3_jax.precision.policy import Recipe

# Leaves up to this size are cut from one draw: on a CPU every draw of its own costs half a second of compilation.
SMALL_LEAF = 2**22
# Leaves with these names are scales of norms: they start at 1, and weight decay leaves them alone.
NORM_NAMES = ("norm", "scale")


def init_params(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Normal with std `initializer_range`; scales of norms are 1."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameter_shapes(config))
    small = sum(leaf.size for _, leaf in leaves if leaf.size <= SMALL_LEAF)
    pool, used = config.initializer_range * jax.random.normal(key, (small,)), 0
    values: list[Array] = []
    for i, (path, leaf) in enumerate(leaves):
        if path[-1].key in NORM_NAMES:
            values.append(jnp.ones(leaf.shape))
        elif leaf.size <= SMALL_LEAF:
            values.append(pool[used : used + leaf.size].reshape(leaf.shape))
        else:
            values.append(config.initializer_range * jax.random.normal(jax.random.fold_in(key, i), leaf.shape))
        used += leaf.size if leaf.size <= SMALL_LEAF else 0
    return jax.tree.unflatten(tree, values)


def parameter_shapes(config: ModelConfig) -> PyTree[jax.ShapeDtypeStruct]:
    """Shape of every parameter, float32, layers of a kind stacked; nothing is allocated."""
    return jax.tree.map(lambda leaf: leaf, _parameter_shapes(config))  # dictionaries of the caller's own


@functools.cache
def _parameter_shapes(config: ModelConfig) -> PyTree[jax.ShapeDtypeStruct]:
    d, v = config.hidden_size, config.vocab_size
    shapes: dict[str, Any] = {"embed": _float32(v, d), "norm": _float32(d)}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = _float32(d, v)
    x = _float32(1, 1, d)
    context = jax.eval_shape(lambda: TokenContext(jnp.zeros((1, 1), jnp.int32), None, jnp.ones((1, 1))))
    # Shapes need no choice of an implementation, and a command that is refused logs none.
    bias, execution = _float32(config.n_routed_experts), Execution(impl="reference", recipe=Recipe(impl="reference"))
    if config.num_dense_layers:
        shapes["dense"] = _stacked(Block(config, execution, False), config.num_dense_layers, x, bias, context)
    if config.num_moe_layers:
        shapes["moe"] = _stacked(Block(config, execution, True), config.num_moe_layers, x, bias, context)
    if config.num_nextn_predict_layers:
        shapes["mtp"] = _stacked(MTPModule(config, execution), config.num_nextn_predict_layers, x, x, bias, context)
    return shapes


def init_router_bias(config: ModelConfig) -> RouterBias:
    """Zero bias for every router."""
    e = config.n_routed_experts
    return RouterBias(jnp.zeros((config.num_moe_layers, e)), jnp.zeros((config.num_nextn_predict_layers, e)))


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _stacked(module: nn.Module, count: int, *arguments: Any) -> PyTree[jax.ShapeDtypeStruct]:
    one = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: _float32(count, *leaf.shape), one)
