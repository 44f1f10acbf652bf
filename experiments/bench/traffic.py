"""Rows and bytes that dispatch and combine send between devices, from their plans and from the compiled program; nothing is sent.

A row counts for the outermost of `node` and `gpu` in which its sender and its receiver differ. A row that stays on its device counts for
neither.
"""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from dsv3_jax.config import Config, MeshConfig, ModelConfig
from dsv3_jax.parallel.expert import Hop, Placement, block_sizes, combine_tokens, dispatch_tokens, make_hops, pack, plan_hop
from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT_AXES, make_mesh
from experiments.bench.collectives import collectives, totals
from experiments.bench.hlo import parse

Place = dict[str, int]  # index along each of EXPERT_AXES
MOST_SENDERS = 8  # devices whose plans are made; each has thousands of tokens


def rows_sent(experts: Int[np.ndarray, "devices n k"], n_experts: int, hops: tuple[Hop, ...], mesh: MeshConfig) -> dict[str, float]:
    """Rows a token, by axis, in one pass of dispatch, of tokens that start evenly over the devices."""
    sums: Counter[str] = Counter()
    for index, device in zip(np.linspace(0, mesh.expert_devices - 1, len(experts)).astype(int), experts, strict=True):
        sums += _walk(device, n_experts, hops, mesh, {"node": index // mesh.gpu, "gpu": index % mesh.gpu})
    return {axis: sums[axis] / (experts.shape[0] * experts.shape[1]) for axis in EXPERT_AXES}


def _walk(experts: np.ndarray, n_experts: int, hops: tuple[Hop, ...], mesh: MeshConfig, start: Place) -> Counter[str]:
    """Follows the tokens of one device through all hops, as `dispatch_tokens` does."""
    counts: Counter[str] = Counter()
    n, here, stops = len(experts), n_experts, [(experts, start)]
    for hop in hops:
        here //= hop.size
        after = []
        for numbers, at in stops:
            plan, _ = _plan(jnp.asarray(numbers), here, hop.size, n)
            rows = (np.asarray(plan.source).reshape(hop.size, n) < n).sum(1)
            for place, target in enumerate(targets(hop, mesh, at)):
                counts[crossed(at, target)] += int(rows[place])
                after.append((np.where(numbers // here == place, numbers % here, n_experts), target))
        stops = after
    return counts


_plan = jax.jit(plan_hop, static_argnums=(1, 2, 3))


def targets(hop: Hop, mesh: MeshConfig, at: Place) -> list[Place]:
    """The devices that a hop leads to from one of them, in the order of its blocks."""
    sizes = [getattr(mesh, axis) for axis in hop.axes]
    return [at | dict(zip(hop.axes, index, strict=True)) for index in np.ndindex(*sizes)]


def crossed(a: Place, b: Place) -> str:
    """The outermost axis that two devices differ in; "" for one device."""
    return next((axis for axis in EXPERT_AXES if a[axis] != b[axis]), "")


def padded_rows(tokens: int, k: int, placement: Placement, mesh: MeshConfig) -> dict[str, float]:
    """Rows a token, by axis, that blocks of one size send, empty rows included; `tokens` a device."""
    counts: Counter[str] = Counter()
    start = dict.fromkeys(EXPERT_AXES, 0)
    for hop, rows in zip(placement.hops, block_sizes(tokens, k, placement), strict=True):
        for target in targets(hop, mesh, start):
            counts[crossed(start, target)] += rows
    return {axis: counts[axis] / tokens for axis in EXPERT_AXES}


def row_bytes(width: int, k: int, dtype: str, fp8: bool) -> tuple[int, int]:
    """Bytes of a row on the way to its experts, gates and expert numbers in float32 included, and on the way back."""
    number = jnp.dtype(dtype).itemsize
    packed = jax.eval_shape(pack, jax.ShapeDtypeStruct((1, width), dtype)).shape[1]
    return (packed if fp8 else width * number) + 8 * k, width * number


def nodes_a_token(experts: Int[np.ndarray, "*b k"], n_experts: int, nodes: int) -> float:
    """Nodes that a token's experts lie on, on average."""
    on = experts[..., None] // (n_experts // nodes) == np.arange(nodes)
    return float(on.any(-2).sum(-1).mean())


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_picks(key: Array, tokens: int, model: ModelConfig) -> Int[Array, "tokens k"]:
    """What a router with random affinities picks."""
    from dsv3_jax.model.router import choose_experts

    return choose_experts(jax.random.uniform(key, (tokens, model.n_routed_experts)), model)


def compiled_bytes(config: Config, mode: str, fp8: bool, bound: float | None, tokens: int) -> dict[str, dict[str, float]]:
    """Bytes a token of the compiled forward pass of one layer's experts, and what blocks of the plan's size come to."""
    m, mesh = config.model, config.parallel.mesh
    placement = Placement(BATCH_AXES, make_hops(mode, mesh, m), bound)
    sizes = dict(make_mesh(mesh).shape)
    sent = totals(collectives(parse(compile_layer(config, placement, fp8, tokens).as_text()), sizes))["all-to-all"]
    rows = padded_rows(tokens, m.num_experts_per_tok, placement, mesh)
    row = sum(row_bytes(m.hidden_size, m.num_experts_per_tok, config.train.compute_dtype, fp8))
    return {
        "compiled_bytes": {axis: sent.get(axis, 0.0) / tokens for axis in rows},
        "planned_bytes": {axis: count * row for axis, count in rows.items()},
    }


def compile_layer(config: Config, placement: Placement, fp8: bool, tokens: int) -> Any:
    """The experts of one layer over the mesh, forward, without their products, compiled for `tokens` a device from shapes alone."""
    m, mesh = config.model, make_mesh(config.parallel.mesh)

    def layer(x: Array, experts: Array, gates: Array) -> Array:
        arrived = dispatch_tokens(x, experts, gates, m.n_routed_experts, placement, fp8)
        # Something that needs the gates and the numbers of experts, as the products do.
        used = (arrived.gates * arrived.experts).sum(1, keepdims=True).astype(x.dtype)
        return combine_tokens(arrived.x * used, arrived.plans, placement, fp8)

    mapped = jax.shard_map(layer, mesh=mesh, in_specs=(P(BATCH_AXES),) * 3, out_specs=P(BATCH_AXES), check_vma=False)
    n, k = tokens * mesh.devices.size, m.num_experts_per_tok
    shapes = ((n, m.hidden_size), config.train.compute_dtype), ((n, k), jnp.int32), ((n, k), jnp.float32)
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
