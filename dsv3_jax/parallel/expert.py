"""Dispatch and combine between the devices that share the routed experts (V3 sec. 2.1.2, 3.2.2, 3.3.3).

A token travels in *hops*. A hop goes along mesh axes and takes a copy of the token to each place on them that holds an
expert that it picked, once, however many it picked there. *direct* is one hop over node x gpu. *two_hop* is the
node-limited way of the report: along `node` to the device with the same `gpu` index, so at most M copies cross
InfiniBand, then along `gpu` inside the node. Combine takes the same way back and sums at every stop, so inside the node
first. Each is the other's gradient.

Every hop sends dense blocks of one size, `lax.all_to_all`: it runs everywhere, and on NVLink 60 times faster than XLA's
ragged collective. The size is the worst case, every token to one place, so nothing is ever dropped; or, with a `bound`,
so many times a balanced load. Then the rows are counted, and `fullness` above 1 says that some did not fit: the result is
wrong and has to be made again with a larger bound.

In FP8 dispatch sends E4M3 with one power-of-two scale per 128 numbers, as a byte, and so does the gradient of combine;
the two sums are sent in the dtype of activations. An expert's products quantize again, to the very same numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.parallel.heads import Heads
from dsv3_jax.parallel.mesh import EXPERT_AXES
from dsv3_jax.precision.formats import exponent, power_of_two
from dsv3_jax.precision.quantize import BLOCK, Quantized, dequantize, quantize


@dataclasses.dataclass(frozen=True)
class Hop:
    """Places along mesh axes that the experts at hand are divided over, in equal runs."""

    axes: tuple[str, ...]
    size: int
    copies: int  # of a token, at most


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the model's functions are spread when they run inside `shard_map`."""

    batch_axes: tuple[str, ...] = ()  # that sequences are spread over
    hops: tuple[Hop, ...] = ()  # to the experts; (): they are all here
    bound: float | None = None  # rows of buffers, in multiples of a balanced load; None: the worst case
    heads: Heads | None = None  # attention heads over devices, for inference; None: they are all here
    gather_layer: Callable[[str, Any], Any] | None = None  # turns master parts of a layer of a stack into what it computes with

    @property
    def ranks(self) -> int:
        """Devices that the experts are divided over."""
        return math.prod(hop.size for hop in self.hops)


ALONE = Placement()


def make_hops(dispatch: str, mesh: MeshConfig, model: ModelConfig) -> tuple[Hop, ...]:
    """The hops of `parallel.dispatch`; axes of size 1 need none."""
    groups = {"direct": (EXPERT_AXES,), "two_hop": tuple((axis,) for axis in EXPERT_AXES)}[dispatch]
    hops = []
    for axes in groups:
        size = math.prod(getattr(mesh, axis) for axis in axes)
        limits = [size, model.num_experts_per_tok]
        if axes == ("node",) and model.n_group % size == 0:  # whole groups on every node: node-limited routing limits it
            limits.append(model.topk_group)
        hops += [Hop(axes, size, min(limits))] if size > 1 else []
    return tuple(hops)


class HopPlan(NamedTuple):
    """Where each token's copies lie in the blocks that a hop sends, and which token each row of them is."""

    slot: Int[Array, "n k"]  # row of the copy that choice k causes; past the end where an earlier choice causes it, or none
    source: Int[Array, " rows"]  # token of each row; n where the row is empty


class Arrived(NamedTuple):
    """Tokens at the device of their experts; an expert that is not here has a number past the end, as in an empty row."""

    x: Float[Array, "m d"]
    experts: Int[Array, "m k"]  # counted from the first expert that is here
    gates: Float[Array, "m k"]
    plans: tuple[HopPlan, ...]  # the way back
    fullness: Float[Array, ""]  # rows of the fullest block over its size


def dispatch_tokens(
    x: Float[Array, "n d"], experts: Int[Array, "n k"], gates: Float[Array, "n k"], n_experts: int, placement: Placement, fp8: bool = False
) -> Arrived:
    """Takes every token to the devices of its experts. Differentiable in x and gates; `fp8`: x is sent as E4M3."""
    here, nowhere, k = n_experts, n_experts, experts.shape[1]
    plans: list[HopPlan] = []
    fullness = jnp.zeros(())
    sent = jnp.concatenate([gates.astype(jnp.float32), experts.astype(jnp.float32) - nowhere], 1)  # an empty row: no gate, nowhere
    for hop, rows in zip(placement.hops, block_sizes(x.shape[0], k, placement), strict=True):
        here //= hop.size
        plan, fill = plan_hop(experts, here, hop.size, rows)
        sent = move(sent, plan, hop)
        numbers = jax.lax.stop_gradient(sent[:, k:]).astype(jnp.int32) + nowhere
        mine = numbers // here == jax.lax.axis_index(hop.axes)
        experts = jnp.where(mine, numbers % here, nowhere)
        sent = jnp.concatenate([sent[:, :k], experts.astype(jnp.float32) - nowhere], 1)
        plans, fullness = [*plans, plan], jnp.maximum(fullness, fill)
    x = dispatch_rows(x, tuple(plans), placement.hops, fp8)
    return Arrived(x, experts, sent[:, :k].astype(gates.dtype), tuple(plans), fullness)


def block_sizes(tokens: int, k: int, placement: Placement) -> list[int]:
    """Rows of a block of each hop, for so many tokens a device that pick k experts each."""
    sizes, at_hand, copies = [], tokens, 1
    for hop in placement.hops:
        copies = min(k, copies * hop.copies)  # of a token, on all devices that it can reach so far
        rows = at_hand if placement.bound is None else min(at_hand, math.ceil(placement.bound * tokens * copies / hop.size))
        sizes.append(rows)
        at_hand = rows * hop.size
    return sizes


def arriving_pairs(tokens: int, k: int, n_experts: int, placement: Placement) -> int:
    """(token, expert) pairs that a device makes room for; `tokens` of each device pick k of `n_experts` experts."""
    if not placement.hops:
        return tokens * k
    worst = block_sizes(tokens, k, placement)[-1] * placement.hops[-1].size * min(k, n_experts // placement.ranks)
    return worst if placement.bound is None else min(worst, math.ceil(placement.bound * tokens * k))


def plan_hop(experts: Int[Array, "n k"], experts_a_place: int, places: int, rows: int) -> tuple[HopPlan, Float[Array, ""]]:
    """Lays tokens out for a hop, in their order, in one block of `rows` for each place; and rows of the fullest block over that."""
    n, k = experts.shape
    place = experts // experts_a_place  # past the end for an expert that is nowhere
    first = jnp.stack([(place[:, :j] != place[:, j : j + 1]).all(1) for j in range(k)], 1) & (place < places)
    visits = ((place[:, :, None] == jnp.arange(places)) & first[:, :, None]).any(1)
    position = jnp.take_along_axis(jnp.cumsum(visits, 0) - 1, jnp.minimum(place, places - 1), axis=1)
    slot = jnp.where(first & (position < rows), place * rows + position, places * rows).astype(jnp.int32)
    token = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, k))
    source = jnp.full(places * rows, n, jnp.int32).at[slot].set(token, mode="drop")
    return HopPlan(slot, source), visits.sum(0).max() / max(rows, 1)


def combine_tokens(y: Float[Array, "m d"], plans: tuple[HopPlan, ...], placement: Placement, fp8: bool = False) -> Float[Array, "n d"]:
    """Takes rows back to where their tokens came from, summing a token's rows in float32 at every stop. `fp8`: of its gradient."""
    return combine_rows(y, plans, placement.hops, fp8)


# --- rows along hops, and their gradients ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dispatch_rows(x: Array, plans: tuple[HopPlan, ...], hops: tuple[Hop, ...], fp8: bool) -> Array:
    """Copies of x at the end of the hops; empty rows are zero."""
    if not hops:
        return x
    sent = pack(x) if fp8 else x
    for plan, hop in zip(plans, hops, strict=True):
        sent = exchange(rows_to_send(sent, plan), hop)
    return unpack(sent, x.shape[1], x.dtype.name) if fp8 else sent


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def combine_rows(y: Array, plans: tuple[HopPlan, ...], hops: tuple[Hop, ...], fp8: bool) -> Array:
    """Sums of the rows at the start of the hops."""
    del fp8
    for plan, hop in reversed(list(zip(plans, hops, strict=True))):
        y = sum_copies(exchange(y, hop), plan)
    return y


def _dispatch_bwd(hops: tuple[Hop, ...], fp8: bool, plans: tuple[HopPlan, ...], dy: Array) -> tuple[Array, None]:
    return combine_rows(dy, plans, hops, fp8), None


def _combine_bwd(hops: tuple[Hop, ...], fp8: bool, plans: tuple[HopPlan, ...], dy: Array) -> tuple[Array, None]:
    return dispatch_rows(dy, plans, hops, fp8), None


dispatch_rows.defvjp(lambda x, plans, hops, fp8: (dispatch_rows(x, plans, hops, fp8), plans), _dispatch_bwd)
combine_rows.defvjp(lambda y, plans, hops, fp8: (combine_rows(y, plans, hops, fp8), plans), _combine_bwd)


def move(x: Array, plan: HopPlan, hop: Hop) -> Array:
    """One hop of rows as they are."""
    return dispatch_rows(x, (plan,), (hop,), False)


def rows_to_send(x: Array, plan: HopPlan) -> Array:
    """The blocks of a hop, one for each place, joined."""
    return x.at[plan.source].get(mode="fill", fill_value=0)


def sum_copies(rows: Array, plan: HopPlan) -> Array:
    """For every token the sum of its copies' rows, in float32, returned in the dtype of the rows."""
    copies = rows.at[plan.slot].get(mode="fill", fill_value=0)
    return copies.astype(jnp.float32).sum(1).astype(rows.dtype)


def exchange(rows: Array, hop: Hop) -> Array:
    """Block p of the device at place q becomes block q of the device at place p."""
    return jax.lax.all_to_all(rows, hop.axes, 0, 0, tiled=True)


def pack(x: Float[Array, "n d"]) -> UInt8[Array, "n bytes"]:
    """A row as bytes: its numbers as E4M3, then the exponent of each 128 numbers' scale."""
    q = quantize(x, (1, BLOCK), power_of_two=True)
    values = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
    return jnp.concatenate([values, (exponent(q.scales) + 127).astype(jnp.uint8)], 1)


def unpack(packed: UInt8[Array, "n bytes"], width: int, dtype: str) -> Float[Array, "n d"]:
    """What `pack` kept of rows of `width` numbers."""
    values = jax.lax.bitcast_convert_type(packed[:, :width], jnp.float8_e4m3fn)
    scales = power_of_two(packed[:, width:].astype(jnp.int32) - 127)
    return dequantize(Quantized(values, scales, (1, BLOCK)), dtype)
