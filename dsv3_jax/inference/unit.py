"""A deployment unit: the model on the devices of a mesh, for prefill and for decoding (V3 sec. 3.4).

    node, gpu   groups that hold different sequences (data parallelism), and with `tensor` all of the experts (expert parallelism)
    tensor      devices of a group: each has some of the heads, and outside attention some of the group's tokens (TP with SP)

The latent cache of a sequence is on every device of its group. In prefill tokens are cut along positions, in decoding along
sequences. Dense FFNs and shared experts run on a device's own tokens, whole. A call takes one micro-batch or more; with two, dispatch
and combine of one can run beside attention and experts of the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig
from dsv3_jax.inference.cache import Cache, init_cache
from dsv3_jax.inference.decode import Forwarded, MicroBatch, forward_together
from dsv3_jax.model.mla import contiguous
from dsv3_jax.model.moe import REPLICA_SLOTS
from dsv3_jax.model.transformer import Execution, Params, RouterBias, logits
from dsv3_jax.parallel.expert import Hop, Placement, make_hops
from dsv3_jax.parallel.heads import Heads
from dsv3_jax.parallel.sharding import Table, compute_place, parameter_name

GROUPS, TENSOR = ("node", "gpu"), "tensor"
ALL = (*GROUPS, TENSOR)
# Heads are the last dimension of what makes queries, keys and values, and the first of what takes the heads' results.
TABLE: Table = (
    (REPLICA_SLOTS, ()),
    ("experts", (None, ALL)),
    ("q_proj", (None, None, TENSOR)),
    ("q_b_proj", (None, None, TENSOR)),
    ("kv_b_proj", (None, None, TENSOR)),
    ("o_proj", (None, TENSOR)),
)
PREFILL_DIM, DECODE_DIM = 1, 0  # of [b, t]: what a group's tokens are cut along


@dataclasses.dataclass(frozen=True)
class Unit:
    """A mesh, and the model as its devices run it. Made by `of`."""

    mesh: Mesh
    config: ModelConfig
    execution: Execution

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        execution: Execution,
        *,
        node: int = 1,
        gpu: int = 1,
        tensor: int = 1,
        dispatch: str = "two_hop",
        dispatch_bound: float | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Unit":
        """A unit of node x gpu groups of `tensor` devices each, which must be on one node; `devices`: others than those that are here.

        `dispatch` and `dispatch_bound` mean what they do in `parallel` of a training run. Raises ConfigError where there are too few
        devices, or where `tensor` does not divide the heads.
        """
        wanted, there = node * gpu * tensor, devices or jax.devices()
        if wanted > len(there):
            raise ConfigError("unit", wanted, f"node {node} x gpu {gpu} x tensor {tensor} are {wanted} devices and there are {len(there)}")
        if config.num_attention_heads % tensor:
            raise ConfigError("tensor", tensor, f"must divide the {config.num_attention_heads} attention heads")
        mesh = Mesh(np.array(there[:wanted]).reshape(node, gpu, tensor), ALL, axis_types=(AxisType.Auto,) * len(ALL))
        hops = tuple(_on_unit(hop) for hop in make_hops(dispatch, MeshConfig(node=node, gpu=gpu * tensor), config))
        return cls(mesh, config, dataclasses.replace(execution, placement=Placement(hops=hops, bound=dispatch_bound)))

    @property
    def groups(self) -> int:
        """Groups of devices that hold different sequences."""
        return self.mesh.devices.size // self.mesh.shape[TENSOR]

    def along(self, dim: int) -> Execution:
        """The execution where a group's tokens are cut along this dimension of [b, t]."""
        heads = Heads(TENSOR, self.mesh.shape[TENSOR], dim)
        return dataclasses.replace(self.execution, placement=dataclasses.replace(self.execution.placement, heads=heads))

    def places(self, params: PyTree) -> PyTree[P]:
        """Where each parameter lies. Raises ConfigError where the devices do not divide it."""
        return jax.tree_util.tree_map_with_path(lambda path, p: compute_place(parameter_name(path), p.shape, self.mesh, TABLE), params)

    def put(self, params: Params) -> Params:
        """The parameters of the main model on the devices of the unit."""
        params = main_model(params)
        return jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.places(params)))

    def abstract(self, tree: PyTree, where: PyTree[P] | P) -> PyTree:
        """Shapes, dtypes and places of a tree of arrays or shapes, to lower a program with."""
        specs = jax.tree.map(lambda _: where, tree) if isinstance(where, P) else where
        return jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)), tree, specs)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of `length` slots for each of `batch` sequences, which the groups divide."""
        make = functools.partial(init_cache, self.config, batch, length, self.execution.dtype)
        return jax.jit(make, out_shardings=NamedSharding(self.mesh, CACHE))()


def main_model(params: Params) -> Params:
    """Parameters without those of MTP modules, which a unit does not run and whose experts are in no placement of redundant ones."""
    return {name: part for name, part in params.items() if name != "mtp"}


def _on_unit(hop: Hop) -> Hop:
    """A hop of a mesh whose `gpu` is a unit's gpu x tensor."""
    return dataclasses.replace(hop, axes=tuple(axis for name in hop.axes for axis in (("gpu", TENSOR) if name == "gpu" else (name,))))


CACHE = P(None, GROUPS)
Caches = tuple[Cache, ...]


class Scored(NamedTuple):
    """What a call returns. Where `fullness` is above 1 the bound was too small on some device: scores and new entries are wrong.

    The same call on these caches, with a unit of a larger bound, then gives the right ones: it writes the same places again.
    """

    scores: Float[Array, "m b v"]
    caches: Caches
    fullness: Float[Array, ""]


@functools.partial(jax.jit, static_argnames="unit", donate_argnames="caches")
def prefill(
    params: Params, bias: RouterBias, tokens: Int[Array, "m b t"], lengths: Int[Array, "m b"], caches: Caches, unit: Unit
) -> Scored:
    """Scores of the token after each prompt of m micro-batches, and the caches with the prompts in them.

    Prompts are padded on the right to t tokens, `lengths` are their own. The groups divide b, the devices of a group t.
    """
    _check("prompts", tokens.shape[1], unit.groups)
    _check("tokens of a prompt", tokens.shape[2], unit.mesh.shape[TENSOR])

    def here(params: Params, bias: RouterBias, tokens: Array, lengths: Array, caches: Caches) -> Scored:
        shape = (tokens.shape[1], tokens.shape[2] * unit.mesh.shape[TENSOR])
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        batches = [MicroBatch(tokens[i], positions, cache, None) for i, cache in enumerate(caches)]
        outputs = forward_together(params, bias, batches, contiguous, unit.config, unit.along(PREFILL_DIM))
        return _scored(params, [_at(out.hidden, ends) for out, ends in zip(outputs, lengths - 1, strict=True)], outputs)

    return _on_devices(here, unit, P(None, GROUPS, TENSOR), P(None, GROUPS))(params, bias, tokens, lengths, caches)


@functools.partial(jax.jit, static_argnames="unit", donate_argnames="caches")
def decode(params: Params, bias: RouterBias, tokens: Int[Array, "m b"], positions: Int[Array, "m b"], caches: Caches, unit: Unit) -> Scored:
    """Scores of the token after `tokens`, which sit at `positions`, of m micro-batches, and their caches. The devices divide b."""
    _check("sequences", tokens.shape[1], unit.mesh.devices.size)

    def here(params: Params, bias: RouterBias, tokens: Array, positions: Array, caches: Caches) -> Scored:
        batches = []
        for i, cache in enumerate(caches):
            at = positions[i, :, None]
            batches.append(MicroBatch(tokens[i, :, None], at, cache, jnp.arange(cache.moe.c_kv.shape[2]) <= at[:, :, None]))
        outputs = forward_together(params, bias, batches, contiguous, unit.config, unit.along(DECODE_DIM))
        return _scored(params, [out.hidden[:, 0] for out in outputs], outputs)

    return _on_devices(here, unit, P(None, ALL), P(None, ALL))(params, bias, tokens, positions, caches)


def _on_devices(here: Callable[..., Any], unit: Unit, tokens: P, scores: P) -> Callable[..., Any]:
    """`here(params, bias, tokens, numbers of a group's sequences, caches)` of one device as a function of whole arrays."""

    def whole(params: Params, *rest: Any) -> Any:
        specs = (unit.places(params), P(), tokens, P(None, GROUPS), CACHE)
        out: Any = (scores, CACHE, P())
        return jax.shard_map(here, mesh=unit.mesh, in_specs=specs, out_specs=Scored(*out), check_vma=False)(params, *rest)

    return whole


def _scored(params: Params, last: list[Array], outputs: list[Forwarded]) -> Scored:
    fullness = jax.lax.pmax(jnp.stack([out.fullness for out in outputs]).max(), ALL)
    return Scored(logits(params, jnp.stack(last)), tuple(out.cache for out in outputs), fullness)


def _at(hidden: Float[Array, "b here_t d"], ends: Int[Array, " b"]) -> Float[Array, "b d"]:
    """The hidden state at position `ends` of each sequence, on whichever device of the group it is."""
    t = hidden.shape[1]
    at = ends - jax.lax.axis_index(TENSOR) * t
    found = jnp.take_along_axis(hidden, jnp.clip(at, 0, t - 1)[:, None, None], axis=1)[:, 0]
    return jax.lax.psum(jnp.where(((at >= 0) & (at < t))[:, None], found, 0), TENSOR)


def _check(what: str, count: int, devices: int) -> None:
    if count % devices:
        raise ConfigError(what, count, f"must be a multiple of {devices}, the devices or groups that they are spread over")
