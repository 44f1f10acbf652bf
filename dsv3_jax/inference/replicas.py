"""A model whose routed experts are held in more slots than there are experts (V3 sec. 3.4): the same function, other places."""

import jax
import jax.numpy as jnp

from dsv3_jax.inference.placement import Replicas
from dsv3_jax.model.moe import REPLICA_SLOTS
from dsv3_jax.model.transformer import Params


def with_replicas(params: Params, replicas: Replicas) -> Params:
    """The parameters with the experts of every main MoE layer in the slots of a placement; MTP modules keep theirs.

    The copies are of the same weights, so any replica gives the same result. Raises ValueError when the layers do not match.
    """
    mlp = params["moe"]["mlp"]
    layers, experts = mlp["experts"]["down_proj"].shape[:2]
    if replicas.replica_count.shape != (layers, experts):
        raise ValueError(f"the placement is of {replicas.replica_count.shape} layers and experts, the model has {(layers, experts)}")
    slots = jnp.asarray(replicas.physical_to_logical)
    stacks = jax.tree.map(lambda stack: jax.vmap(lambda layer, take: layer[take])(stack, slots), mlp["experts"])
    held = {**stacks, REPLICA_SLOTS: jnp.asarray(replicas.logical_to_physical, jnp.int32)}
    return {**params, "moe": {**params["moe"], "mlp": {**mlp, "experts": held}}}
