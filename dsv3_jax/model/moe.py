"""Dropless mixture of experts over rows sorted by expert (V3 sec. 2.1.2; DeepSeekMoE 2401.06066).

Every (token, expert) pair becomes a row. Rows are sorted by expert and each expert's run is padded with
zero rows to whole blocks, so that a block belongs to one expert: the shape of `grouped_linear` and of the
Hopper kernels. There is no capacity: the buffer holds the worst case of any routing, empty and overfull
experts included. Moving rows is a gather in both directions, so nothing depends on atomic addition.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import SwiGLU, joined, kernel_param
from dsv3_jax.model.router import Routing, balance_loss, picked_counts, route
from dsv3_jax.parallel.expert import ALONE, Placement, arriving_pairs, combine_tokens, dispatch_tokens
from dsv3_jax.precision.hopper import Few
from dsv3_jax.precision.linear import Prepared, prepare, routed_ffn
from dsv3_jax.precision.policy import BF16, EXPERT_DOWN, EXPERT_UP, Recipe
from dsv3_jax.precision.quantize import BLOCK, Quantized, is_at_rest, kernel_shape
from dsv3_jax.precision.rows import Rows
from pallas_kernels.backend import is_hopper, platform, use_pallas

FEW_TOKENS = 128  # of a decoding step: up to so many, a block with room for all of them is the smaller one for an expert


class BlockPlan(NamedTuple):
    """Where each (token, choice) pair goes in the blocked buffer, and where each buffer row comes from."""

    slot: Int[Array, "n k"]  # row of the flat buffer that holds the pair
    pair: Int[Array, " rows"]  # pair (token * k + choice) of each row; n * k for padding
    block_expert: Int[Array, " blocks"] | Few  # n_experts: nobody's, at the end

    @property
    def rows(self) -> Rows:
        """The same for tokens: padding is a copy of token n."""
        return Rows(self.pair // self.slot.shape[1], self.slot)


class MoEOutput(NamedTuple):
    """Output of a MoE layer, and what balancing and dispatch need to see."""

    y: Float[Array, "b t d"]
    load: Float[Array, " e"]
    balance_loss: Float[Array, ""]
    fullness: Float[Array, ""]  # of the fullest dispatch buffer; above 1 y is wrong, see parallel.expert; 0 without dispatch


def block_rows(pairs: int, n_experts: int, backend: str) -> int:
    """Rows of a block: about a quarter of an expert's mean run, a power of two, so that padding stays under a quarter.

    A CPU gains nothing beyond 64 rows. A GPU wants larger tiles, which also gather fewer copies of the kernels; those
    for Hopper gather nothing and work on tiles of 128 or 256 rows.
    """
    smallest, largest = (1, 64) if backend == "cpu" else (128, 256 if is_hopper() else 1024)
    rows = smallest
    while rows * 2 <= min(largest, pairs // (4 * n_experts)):
        rows *= 2
    return rows


@jax.named_scope("dispatch")
def plan_blocks(experts: Int[Array, "n k"], n_experts: int, rows: int, most: int | None = None) -> BlockPlan:
    """Lays the pairs of each expert, in the order of the tokens, out from the start of a block.

    With `most`, numbers of `n_experts` and above are experts that are elsewhere, and at most so many pairs have one that is
    here: the first block is then padding, and the pairs of experts elsewhere share its first row of zeros.
    """
    pairs = experts.size
    here = pairs if most is None else most
    blocks = min(here, (here + n_experts * (rows - 1)) // rows) + (most is not None)
    flat = experts.reshape(-1)
    counts, place = _runs(flat, n_experts)
    blocks_each = -(-counts // rows)
    block_ends = (most is not None) + jnp.cumsum(blocks_each)
    slot = ((block_ends - blocks_each) * rows)[flat] + place
    if most is not None:
        slot = jnp.where(flat < n_experts, slot, blocks * rows)
    pair = jnp.full(blocks * rows, pairs, jnp.int32).at[slot].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=most is None)
    if most is not None:
        slot = jnp.where(slot < blocks * rows, slot, 0)
    # The default method is a loop, whose launches are a third of those of a decoded token.
    block_expert = jnp.searchsorted(block_ends, jnp.arange(blocks), side="right", method="compare_all")
    # Behind barriers, or XLA computes slots anew for every number that is gathered by them.
    slot, block_expert = (jax.lax.optimization_barrier(part.astype(jnp.int32)) for part in (slot.reshape(experts.shape), block_expert))
    # Kept for the backward pass like the choice that it follows from: it takes a sort.
    slot, pair = (checkpoint_name(part, "routing") for part in (slot, pair))
    return BlockPlan(slot, pair, block_expert)


def plan_few(experts: Int[Array, "n k"], n_experts: int) -> BlockPlan:
    """A block for each expert, with room for all tokens, in whole eights: fewer rows than blocks of 128 have where tokens are few.

    A token has to pick different experts.
    """
    rows = -(-experts.shape[0] // 8) * 8
    flat = experts.reshape(-1)
    used, place = _runs(flat, n_experts)
    slot = flat * rows + place
    pair = jnp.full(n_experts * rows, flat.size, jnp.int32).at[slot].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    slot = jax.lax.optimization_barrier(slot.reshape(experts.shape).astype(jnp.int32))  # as in `plan_blocks`
    return BlockPlan(slot, pair, Few(used.astype(jnp.int32)))


_FEW_PAIRS = 256  # where comparing every pair with every other costs less than the kernels of a sort


def _runs(flat: Int[Array, " pairs"], n_experts: int) -> tuple[Int[Array, " e"], Int[Array, " pairs"]]:
    """How many pairs each expert has, and how many of its own come before each pair (anything for experts elsewhere)."""
    counts = (flat[:, None] == jnp.arange(n_experts)).sum(0)  # bincount adds atomically, all pairs of an expert to one number
    if flat.size <= _FEW_PAIRS:
        return counts, jnp.tril(flat[:, None] == flat, -1).sum(1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.arange(flat.size) - (jnp.cumsum(counts) - counts)[flat[order]]
    return counts, jnp.zeros(flat.size, place.dtype).at[order].set(place, unique_indices=True)


def rows_of_gates(gates: Float[Array, "n k"], plan: BlockPlan) -> Float[Array, " rows"]:
    """The gate of each buffer row, 0 for padding."""
    return _rows_of_gates(gates, plan)


@jax.custom_vjp
@jax.named_scope("dispatch")
def _rows_of_gates(gates: Array, plan: BlockPlan) -> Array:
    return jnp.take(gates.reshape(-1), plan.pair, mode="fill", fill_value=0)


_rows_of_gates.defvjp(lambda gates, plan: (_rows_of_gates(gates, plan), plan), lambda plan, d: (d[plan.slot], None))


def expert_ffn(
    x: Float[Array, "n d"],
    routing: Routing,
    gate_up: Float[Array, "e d 2 f"] | Quantized,
    down: Float[Array, "e f d"] | Quantized,
    rows: int,
    recipe: Recipe = BF16,
    placement: Placement = ALONE,
    prepared: Prepared | None = None,
) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """Sum over each token's experts of `gate * down(silu(x W_gate) * (x W_up))`, and the fullness of the buffers.

    The gate multiplies the SwiGLU output instead of the result, which is the same sum: the gradient of the
    gate then needs no copy of the down-projection's output, the largest activation of the layer. `prepared`: of x, where all
    experts are here.
    """
    e = kernel_shape(down)[0]
    n_experts = e * placement.ranks
    arrived = dispatch_tokens(x, routing.experts, routing.gates, n_experts, placement, recipe.sends_inputs)
    n, k = routing.experts.shape
    most = arriving_pairs(n, k, n_experts, placement)
    few = is_at_rest(down) and not placement.hops and n <= FEW_TOKENS and use_pallas(recipe.impl)
    plan = plan_few(arrived.experts, e) if few else plan_blocks(arrived.experts, e, rows, most if placement.hops else None)
    gates = rows_of_gates(arrived.gates, plan)
    y = routed_ffn(arrived.x, plan.rows, joined(gate_up), gates, down, plan.block_expert, recipe, prepared)
    fullness = jnp.maximum(arrived.fullness, (arrived.experts < e).sum() / most) if placement.hops else jnp.zeros(())
    return combine_tokens(y, arrived.plans, placement, recipe.sends_gradients), fullness


REPLICA_SLOTS = "replica_slots"  # beside the stacked experts, [e, most], where some are held more than once; see inference/replicas.py


def pick_replicas(experts: Int[Array, "n k"], slots: Int[Array, "e most"]) -> Int[Array, "n k"]:
    """The slot that serves each pair: the tokens of a batch take the replicas of an expert in turn. Slots past the last are -1."""
    counts = (slots >= 0).sum(1)
    turn = jnp.arange(experts.shape[0])[:, None] % counts[experts]
    return slots[experts, turn]


class Experts(nn.Module):
    """Parameters of the routed experts of one device, stacked on a leading expert axis."""

    config: ModelConfig
    recipe: Recipe = BF16
    placement: Placement = ALONE

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], routing: Routing, prepared: Prepared | None = None
    ) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
        c = self.config
        here = c.n_routed_experts // self.placement.ranks
        if self.has_variable("params", REPLICA_SLOTS):
            here = self.get_variable("params", "gate_up_proj").shape[0]
            routing = routing._replace(experts=pick_replicas(routing.experts, self.get_variable("params", REPLICA_SLOTS)))
        d, f, std = c.hidden_size, c.moe_intermediate_size, c.initializer_range
        gate_up = kernel_param(self, "gate_up_proj", std, (here, d, 2, f))
        down = kernel_param(self, "down_proj", std, (here, f, d))
        rows = block_rows(routing.experts.size, here, platform())
        if self.recipe.fp8:
            rows = max(rows, BLOCK)  # a tile of Wgrad lies within a block
        return expert_ffn(x, routing, gate_up, down, rows, self.recipe, self.placement, prepared)


class MoE(nn.Module):
    """Shared experts plus routed experts; returns the output with the layer's load and balance loss."""

    config: ModelConfig
    balance: str
    recipe: Recipe = BF16
    placement: Placement = ALONE

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], bias: Float[Array, " e"], weights: Float[Array, "b t"]) -> MoEOutput:
        c = self.config
        flat = x.reshape(-1, c.hidden_size)
        kernel = self.param("router", nn.initializers.normal(c.initializer_range), (c.hidden_size, c.n_routed_experts), jnp.float32)
        routing = route(flat, kernel, bias, c)
        # Once for both kinds of experts, unless dispatch takes tokens elsewhere, where they are quantized anew.
        prepared = None if self.placement.hops else prepare(flat, self.recipe, EXPERT_UP)
        y, fullness = Experts(c, self.recipe, self.placement, name="experts")(flat, routing, prepared)
        if c.n_shared_experts:
            width = c.n_shared_experts * c.moe_intermediate_size
            shared = SwiGLU(width, c.initializer_range, self.recipe, (EXPERT_UP, EXPERT_DOWN), name="shared_experts")
            y = y + shared(flat, prepared)
        load = picked_counts(routing.experts, weights.reshape(-1), c.n_routed_experts)
        balance = balance_loss(routing, weights, self.balance, c, self.placement.batch_axes)
        return MoEOutput(y.reshape(x.shape), load, balance, fullness)
