"""A model's functions on the devices of a mesh: when weights are gathered, and when gradients and losses are summed.

parallel.shard  gathered                        summed and cut
optimizer       once a step, before its loop    once a step, after its loop
gradients       once a step                     after every micro-batch
parameters      a layer at a time, at use       a layer at a time, in the backward pass

Training on a pipeline gathers by stages instead, see `pipeline_step`; what is said here of whole models is then for evaluation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from dsv3_jax.config import Config, MeshConfig
from dsv3_jax.model.init import parameter_shapes
from dsv3_jax.model.loss import Losses, psum_losses
from dsv3_jax.model.transformer import Execution, Params
from dsv3_jax.parallel.expert import Placement, make_hops
from dsv3_jax.parallel.mesh import BATCH_AXES, PIPE_AXIS, make_mesh
from dsv3_jax.parallel.sharding import STACKS, Place, gather, places, scatter, sum_whole


@dataclasses.dataclass(frozen=True)
class Spread:
    """What the functions of a step need to know of the mesh that they run on."""

    mesh: Mesh
    shard: str
    places: PyTree[Place]
    execution: Execution  # with its placement on the mesh

    @classmethod
    def of(cls, config: Config, execution: Execution, mesh: Mesh | None, shard: str | None = None) -> "Spread":
        """The spread that a configuration asks for on a mesh of its sizes; None: the same on one device.

        `shard`: another one than the configuration's.
        """
        mesh = mesh or make_mesh(MeshConfig())
        where, shard = places(parameter_shapes(config.model), mesh), shard or config.parallel.shard
        hops = make_hops(config.parallel.dispatch, MeshConfig(**mesh.shape), config.model)
        placement = Placement(BATCH_AXES, hops, config.parallel.dispatch_bound)
        if shard == "parameters":
            placement = dataclasses.replace(placement, gather_layer=lambda section, layer: gather(layer, where[section], stacked=True))
        return cls(mesh, shard, where, dataclasses.replace(execution, placement=placement))

    @property
    def devices(self) -> int:
        """Devices that rows are spread over."""
        return self.mesh.devices.size // self.ranks

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline."""
        return self.mesh.shape[PIPE_AXIS]

    def over_rows(
        self, f: Callable[..., Any], micro_batches: bool, scalars: int = 0, returns_gradients: bool = False
    ) -> Callable[..., Any]:
        """`f(params, bias, rows, *scalars)` of one device's master parts and rows as a function of whole arrays.

        It returns what is equal everywhere, with `returns_gradients` after a tree of master parts.
        """
        masters = jax.tree.map(lambda at: at.master, self.places)
        rows = P(None, BATCH_AXES) if micro_batches else P(BATCH_AXES)
        out = (masters, P()) if returns_gradients else P()
        # Values that differ between devices are not tracked (check_vma): custom gradients would have to state theirs.
        return jax.shard_map(f, mesh=self.mesh, in_specs=(masters, P(), rows, *[P()] * scalars), out_specs=out, check_vma=False)

    def before_loop(self, params: Params) -> Params:
        """Master parts as the loop over micro-batches holds them."""
        return params if self.shard == "parameters" else gather(params, self.places)

    def at_use(self, params: Params) -> Params:
        """What the loop holds as the model takes it; layers are still gathered one at a time."""
        if self.shard != "parameters":
            return params
        return {name: leaf if name in STACKS else gather(leaf, self.places[name]) for name, leaf in params.items()}

    def after_micro_batch(self, grads: Params) -> Params:
        """Gradients of a micro-batch as the loop adds them up."""
        return scatter(grads, self.places) if self.shard == "gradients" else grads

    def after_loop(self, grads: Params) -> Params:
        """The loop's sum as master parts of the whole batch's gradient."""
        if self.shard == "optimizer":
            return scatter(grads, self.places)
        return sum_whole(grads, self.places) if self.shard == "parameters" else grads

    def sum(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Sum over the devices that hold different rows."""
        return jax.lax.psum(tree, BATCH_AXES)

    def sum_losses(self, losses: Losses) -> Losses:
        """Losses of the whole micro-batch; the balance loss is a mean over its sequences, as on one device."""
        total = psum_losses(losses, BATCH_AXES)
        return total._replace(balance_loss=total.balance_loss / self.devices)
