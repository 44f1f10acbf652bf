"""Rows and bytes that dispatch and combine send between devices, from their plans; nothing is sent.

A row counts for the outermost of `node` and `gpu` in which its sender and its receiver differ. A row that stays on its device counts for
neither.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.parallel.expert import Hop, Placement, block_sizes, pack, plan_hop
from dsv3_jax.parallel.mesh import EXPERT_AXES

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
