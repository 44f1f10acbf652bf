"""A train step made from shapes alone: lowered for any mesh without allocating a weight, a row or a moment."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel.mesh import batch_sharding, replicated
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.training.checkpoint import abstract_like
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import create_state
from dsv3_jax.training.step import Rates, jit_train_step, make_train_step
from pallas_kernels.backend import compiling_for


def batch_arguments(config: Config, mesh: Mesh) -> tuple[Any, ...]:
    """Shapes and places of what a train step takes beside the state: rows, how many micro-batches of them count, rates."""
    train = config.train
    shape = (train.batch_size // train.micro_batch_size, train.micro_batch_size, train.sequence_length + 1)
    rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))
    return (rows, *abstract_like((np.zeros((), np.int32), Rates(*jnp.zeros(3))), replicated(mesh)))


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The step as the trainer jits it, lowered for the devices of `mesh`, which need not exist: they are only compiled for."""
    optimizer = make_optimizer(config.optimizer)
    shapes = jax.eval_shape(functools.partial(create_state, config, optimizer))
    shardings = state_shardings(shapes, mesh)
    step = make_train_step(config, Execution.of(config, 0), optimizer, mesh)
    jitted = jit_train_step(step, (shardings, replicated(mesh)))
    with compiling_for(mesh.devices.flat[0]):
        return jitted.lower(abstract_like(shapes, shardings), *batch_arguments(config, mesh))
