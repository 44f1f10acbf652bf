"""Everything a step changes, as one pytree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree, UInt32

from dsv3_jax.config import Config
from dsv3_jax.model.init import SMALL_LEAF, init_params, init_router_bias
from dsv3_jax.model.transformer import Params, RouterBias


class TrainState(NamedTuple):
    """State of a run on the devices. The position in the data lives in the loader; a step draws no random numbers."""

    step: Int[Array, ""]  # batches consumed, skipped steps included
    params: Params  # float32 master weights
    opt_state: PyTree
    router_bias: RouterBias
    skipped_in_a_row: Int[Array, ""]


def create_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, seed: UInt32[Array, ""] | int | None = None
) -> TrainState:
    """Fresh state from `seed` (None: `train.seed`); pure, so that `jit` can place it with any sharding, on `mesh`."""
    params = init_params(config.model, jax.random.key(config.train.seed if seed is None else seed))
    if mesh is not None:
        # Parameters cut from one draw are made whole everywhere: XLA would cut the draw as it cuts them, warn that it cannot, and join it.
        whole = NamedSharding(mesh, P())
        params = jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, whole) if p.size <= SMALL_LEAF else p, params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), init_router_bias(config.model), zero)
