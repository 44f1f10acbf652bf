"""Where every parameter lies: the one table from names to mesh axes, and ZeRO's cut through what it leaves whole.

A parameter has two places. *Compute*: as the model's functions take it, by `TABLE`; routed experts lie on node x gpu and
everything else is on every device. *Master*: the float32 master, its moments and its summed gradient, which are cut in
addition over every axis that the compute place does not use, those of the batch and `pipe` (ZeRO-1, V3 sec. 3.1). `gather`
leads from master to compute and `scatter` sums gradients on the way back; both run inside `shard_map`. On a pipeline
`gather_layers` fetches no more of a stack than the layers that a rank runs.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT_AXES, PIPE_AXIS

STACKS = ("dense", "moe", "mtp")  # their parameters have a leading axis of layers, which the model loops over
MASTER_AXES = (*BATCH_AXES, PIPE_AXIS)  # pipe is innermost: what comes along it is one run, to be gathered over the others

Table = tuple[tuple[str, tuple[Any, ...]], ...]

# The first name that is on a parameter's path decides; the axes of its dimensions are listed from the front.
TABLE: Table = (
    ("experts", (None, EXPERT_AXES)),  # [layers, expert, ...]
)


@dataclasses.dataclass(frozen=True)
class Place:
    """How one parameter is cut: `axes` cut dimension `dim` of the compute place into master parts; () where nothing can."""

    compute: P
    dim: int
    axes: tuple[str, ...]

    @property
    def master(self) -> P:
        if not self.axes:
            return self.compute
        entries = [*self.compute, *[None] * (self.dim + 1 - len(self.compute))]
        entries[self.dim] = self.axes
        return P(*entries)

    def parts(self, kind: str, mesh: Mesh | AbstractMesh) -> int:
        """How many parts its `compute` or `master` place cuts it into."""
        return _size(_axes_of({"compute": self.compute, "master": self.master}[kind]), mesh)

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes that a gradient is summed over and not cut along."""
        return tuple(axis for axis in MASTER_AXES if axis not in _axes_of(self.compute) and axis not in self.axes)


def compute_place(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, table: Table = TABLE) -> P:
    """Where the model's functions take a parameter. Raises ConfigError as `place` does."""
    names = name.split("/")
    spec = next((P(*axes) for key, axes in table if key in names), P())
    _check(name, shape, spec, mesh)
    return spec


def place(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, table: Table = TABLE) -> Place:
    """The place of the parameter with this path ("moe/mlp/experts/down_proj") and shape.

    Raises ConfigError where the table puts two dimensions on one axis, or where the axes do not divide a dimension.
    Master parts cut the longest dimension that all axes left over divide, or as many of the inner ones as do; a parameter
    without such a dimension stays whole. The axis of layers is never cut: the model loops over it.
    """
    names, compute = name.split("/"), compute_place(name, shape, mesh, table)
    unused = tuple(a for a in MASTER_AXES if a not in _axes_of(compute) and mesh.shape[a] > 1)
    free = [d for d in range(names[0] in STACKS, len(shape)) if d >= len(compute) or compute[d] is None]
    for start in range(len(unused)):
        axes = unused[start:]
        divided = [d for d in free if shape[d] and shape[d] % _size(axes, mesh) == 0]
        if divided:
            return Place(compute, max(divided, key=lambda d: shape[d]), axes)
    return Place(compute, 0, ())


def _check(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh | AbstractMesh) -> None:
    used: dict[str, int] = {}
    for dim, entry in enumerate(spec):
        axes = _axes_of(P(entry))
        for axis in axes:
            if axis in used:
                raise ConfigError(f"sharding of {name}", axis, f"dimensions {used[axis]} and {dim} both lie on it; give one another axis")
            used[axis] = dim
        if shape[dim] % _size(axes, mesh):
            sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
            remedy = f"dimension {dim} is {shape[dim]}, which {sizes} do not divide; change one of them"
            raise ConfigError(f"sharding of {name}", shape, remedy)


def _axes_of(spec: P) -> tuple[str, ...]:
    entries = [entry for entry in spec if entry is not None]
    return tuple(axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,)))


def _size(axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def parameter_name(path: tuple[Any, ...]) -> str:
    """The dictionary keys of a pytree path: the same for a parameter, its gradient and its moments; "" for what is none of these."""
    return "/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def places(params: PyTree, mesh: Mesh | AbstractMesh) -> PyTree[Place]:
    """The place of every parameter of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: place(parameter_name(path), leaf.shape, mesh), params)


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree[NamedSharding]:
    """Master places for a whole training state; counters and router bias are on every device."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = parameter_name(path)
        return NamedSharding(mesh, place(name, leaf.shape, mesh).master if name else P())

    return jax.tree_util.tree_map_with_path(one, state)


def gather(params: PyTree[Array], where: PyTree[Place], stacked: bool = False) -> PyTree[Array]:
    """Compute copies of master parts; its gradient sums and cuts. `stacked`: of one layer, whose axis of layers is gone."""

    def one(part: Array, at: Place) -> Array:
        return jax.lax.all_gather(part, at.axes, axis=at.dim - stacked, tiled=True) if at.axes else part

    return jax.tree.map(one, params, where)


def gather_layers(stack: PyTree[Array], where: PyTree[Place], layers: Int[np.ndarray, "ranks most"]) -> PyTree[Array]:
    """Compute copies of those layers of a stack that this rank of the pipeline runs, `layers[rank]`; its gradient sums and cuts.

    Ranks exchange their parts of one another's layers, so that none ever holds a layer that it does not run.
    """

    def one(part: Array, at: Place) -> Array:
        others = tuple(axis for axis in at.axes if axis != PIPE_AXIS)
        if PIPE_AXIS in at.axes:
            part = jax.lax.all_to_all(part[layers.reshape(-1)], PIPE_AXIS, split_axis=0, concat_axis=at.dim, tiled=True)
        else:
            part = part[jnp.asarray(layers)[jax.lax.axis_index(PIPE_AXIS)]]
        return jax.lax.all_gather(part, others, axis=at.dim, tiled=True) if others else part

    return jax.tree.map(one, stack, where)


def scatter(grads: PyTree[Array], where: PyTree[Place]) -> PyTree[Array]:
    """Gradients of compute copies summed over the devices that hold them, each device keeping its master part."""

    def one(grad: Array, at: Place) -> Array:
        return jax.lax.psum_scatter(grad, at.axes, scatter_dimension=at.dim, tiled=True) if at.axes else grad

    return sum_whole(jax.tree.map(one, grads, where), where)


def sum_whole(grads: PyTree[Array], where: PyTree[Place]) -> PyTree[Array]:
    """What `scatter` does along the axes that do not cut a parameter."""
    return jax.tree.map(lambda grad, at: jax.lax.psum(grad, at.summed) if at.summed else grad, grads, where)
