"""Everything a step changes, as one pytree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dsv3_jax.config import Config
from dsv3_jax.model.init import init_params, init_router_bias
from dsv3_jax.model.transformer import Params, RouterBias


class TrainState(NamedTuple):
    """State of a run on the devices. The position in the data lives in the loader; a step draws no random numbers."""

    step: Int[Array, ""]  # batches consumed, skipped steps included
    params: Params  # float32 master weights
    opt_state: PyTree
    router_bias: RouterBias
    skipped_in_a_row: Int[Array, ""]


def create_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Fresh state from `train.seed`; pure, so that `jit` can place it with any sharding."""
    params = init_params(config.model, jax.random.key(config.train.seed))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), init_router_bias(config.model), zero)
