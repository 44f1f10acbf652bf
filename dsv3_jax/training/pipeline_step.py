"""The model on a pipeline: which rank runs which layers, and the gradients of a batch from a schedule (V3 sec. 3.2).

`split_layers` gives every stage its layers. Dense and MoE layers are separate stacks, so a stage has a part of each,
padded to the longest of any stage: all ranks run the same program. Embedding, final norm, output head and MTP modules
are the same on every rank, and the first and the last stage use them: in DualPipe these two share a rank. A rank thus
holds, for each direction, its layers, and one copy of the rest.

What a rank computes with is a linear function of the master parts of all, `_stage_params`: an exchange along `pipe`, then
a gathering over the other axes. Its transpose takes the gradients back: it adds up the two copies of a stage that
DualPipe keeps, drops padding, sums over the devices that saw other rows, and leaves each its master part.

Inside a stage devices exchange tokens along `node` and `gpu`. They do so in branches that a rank takes by its number along
`pipe` and by nothing else, so all devices that share an exchange reach it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.loss import Losses, add_losses, head_losses, objective, psum_losses
from dsv3_jax.model.transformer import (
    UNROLLED_LAYERS,
    Execution,
    LayerReports,
    Params,
    RouterBias,
    TrunkOutput,
    embed,
    scan_blocks,
    token_context,
)
from dsv3_jax.parallel.mesh import PIPE_AXIS
from dsv3_jax.parallel.pipeline import Stage, StageParams, run_pipeline
from dsv3_jax.parallel.schedules import Schedule, Seat, make_schedule, split_layers
from dsv3_jax.parallel.sharding import Place, gather, gather_layers, sum_whole
from dsv3_jax.parallel.ticks import lower

STACKS = ("dense", "moe")


@dataclasses.dataclass(frozen=True)
class Cut:
    """Layers of each stage, as numbers within the stack of their kind. Where a stage has fewer than others, 0 fills up."""

    layers: dict[str, Int[np.ndarray, "stages most"]]
    count: dict[str, Int[np.ndarray, " stages"]]

    @classmethod
    def of(cls, config: ModelConfig, n_stages: int) -> "Cut":
        """Raises ConfigError when there are fewer layers than stages."""
        first_moe = config.num_dense_layers
        split = split_layers(config.num_hidden_layers, n_stages)
        parts = {
            "dense": [[layer for layer in stage if layer < first_moe] for stage in split],
            "moe": [[layer - first_moe for layer in stage if layer >= first_moe] for stage in split],
        }
        most = {kind: max(map(len, stages)) for kind, stages in parts.items()}
        layers = {kind: np.array([s + [0] * (most[kind] - len(s)) for s in stages], np.int32) for kind, stages in parts.items()}
        return cls(layers, {kind: np.array(list(map(len, stages)), np.int32) for kind, stages in parts.items()})


class Room(NamedTuple):
    """What one rank has room for; without a pipeline the whole model once, one micro-batch, and nothing that waits."""

    layers: dict[str, int]  # of each stack, in one stage; empty: all
    stages: int  # held at once: two where the schedule has two directions
    kept: int  # micro-batches of which the layers of a stage keep what their backward pass needs
    slots: int  # for inputs and outputs of stages, and gradients of the latter


@functools.cache
def room_of_rank(config: Config) -> Room:
    """Every stage has room for the most layers of either kind that any has. Raises ConfigError for a pipeline that cannot run."""
    parallel, train = config.parallel, config.train
    if parallel.mesh.pipe == 1:
        return Room({}, 1, 1, 0)
    schedule = make_schedule(parallel.schedule, parallel.mesh.pipe, train.batch_size // train.micro_batch_size)
    most = {kind: layers.shape[1] for kind, layers in Cut.of(config.model, schedule.n_stages).layers.items()}
    slots = lower(schedule).slots
    return Room(most, len(schedule.directions), slots["kept"], sum(slots.values()))


class MicroBatch(NamedTuple):
    """What the stages need to know of a micro-batch; stacked over M."""

    rows: Int[Array, "b row"]
    used: Float[Array, ""]  # 0: a seat in the schedule that a batch still growing does not fill
    counts: Float[Array, " heads"]  # targets of the whole batch, see `objective`
    mtp_weight: Float[Array, ""]
    balance_weight: Float[Array, ""]


def pipelined_gradients(
    params: Params,
    bias: RouterBias,
    batch: MicroBatch,
    schedule: Schedule,
    config: ModelConfig,
    execution: Execution,
    where: PyTree[Place],
) -> tuple[Params, Losses]:
    """Gradient of the summed objectives of M micro-batches, and this device's losses of them, summed over the stages.

    To be called inside `shard_map` over the whole mesh. Parameters and the gradient, which is that of all devices' rows,
    are master parts that lie as `where` says; bias and batch are the same along `pipe`.
    """
    cut = Cut.of(config, schedule.n_stages)
    stages = [_stages(schedule, direction) for direction in schedule.directions]
    stage_params, to_masters = jax.vjp(lambda p: _stage_params(p, bias, cut, stages, where), params)
    b, row = batch.rows.shape[1:]
    activation = jax.ShapeDtypeStruct((b, row - 1, config.hidden_size), jnp.dtype(execution.dtype))
    stage = _make_stage(cut, schedule.n_stages, config, execution)
    out = run_pipeline(schedule, stage, stage_params, batch, activation, add_losses)
    (gradients,) = to_masters(out.gradients)
    parts = [_whole_model(losses, _here(cut.layers["moe"][at]), bias) for losses, at in zip(out.metrics, stages, strict=True)]
    return sum_whole(gradients, where), psum_losses(functools.reduce(add_losses, parts), PIPE_AXIS)


def _stages(schedule: Schedule, direction: int) -> Int[np.ndarray, " ranks"]:
    """The stage that each rank runs for a direction."""
    return np.array([schedule.stage(Seat(rank, direction)) for rank in range(schedule.n_ranks)])


def _here(of_ranks: Int[np.ndarray, "ranks *rest"]) -> Int[Array, "*rest"]:
    """This rank's row of a table of all ranks."""
    return jnp.asarray(of_ranks)[jax.lax.axis_index(PIPE_AXIS)]


def _stage_params(params: Params, bias: RouterBias, cut: Cut, stages: list[np.ndarray], where: PyTree[Place]) -> StageParams:
    """This rank's part of the parameters; the router bias, which is state, goes with them and its gradient is zero."""

    def own(at: np.ndarray) -> Params:
        stacks = {kind: gather_layers(params[kind], where[kind], cut.layers[kind][at]) for kind in STACKS if kind in params}
        return stacks | {"bias": bias.moe[_here(cut.layers["moe"][at])]}

    shared = {name: gather(part, where[name]) for name, part in params.items() if name not in STACKS}
    return StageParams(tuple(map(own, stages)), shared | {"bias": bias.mtp})


def _make_stage(cut: Cut, n_stages: int, config: ModelConfig, execution: Execution) -> Stage:
    """Of every stage: its layers, after the embedding on the first; before the heads on the last."""

    def run_stack(kind: str, own: Params, bias: Array, x: Array, tokens: Array, stage: Array) -> tuple[Array, LayerReports]:
        counts = cut.count[kind]
        count = None if counts.min() == counts.max() else jnp.array(counts)[stage]
        # Written out: XLA runs loops one after another, so in a loop no dispatch could run beside the other direction's products.
        unroll = bias.shape[0] <= UNROLLED_LAYERS
        return scan_blocks(own[kind], bias, x, token_context(tokens, execution), config, execution, kind == "moe", count, unroll)

    def run(own: Params, shared: Params, x: Array, micro: MicroBatch, index: Array) -> tuple[Array, LayerReports]:
        tokens, e = micro.rows[:, :-1], config.n_routed_experts
        x = jax.lax.cond(index == 0, lambda: embed(shared, tokens, execution.dtype), lambda: x)
        if "dense" in own:
            no_bias = jnp.zeros((cut.layers["dense"].shape[1], e))
            x, _ = run_stack("dense", own, no_bias, x, tokens, index)
        if "moe" in own:
            return run_stack("moe", own, own["bias"], x, tokens, index)
        return x, LayerReports(jnp.zeros((0, e)), jnp.zeros(0), jnp.zeros(0))

    def score(shared: Params, y: Array, layers: LayerReports, micro: MicroBatch, index: Array) -> tuple[Array, Losses]:
        out = TrunkOutput(y, layers.load, layers.balance_loss.sum(), layers.fullness.max(initial=0.0))
        losses = _losses(shared, out, micro.rows, index == n_stages - 1, config, execution)
        losses = jax.tree.map(lambda value: micro.used * value, losses)
        return objective(losses, micro.counts, micro.mtp_weight, micro.balance_weight), losses

    return Stage(run, score)


def _losses(shared: Params, out: TrunkOutput, rows: Array, is_last: Array, config: ModelConfig, execution: Execution) -> Losses:
    """Everything that `compute_losses` reports, of one stage: heads and MTP modules are zero unless it is the last."""
    bias = RouterBias(jnp.zeros(out.load.shape), shared["bias"])

    def with_heads() -> Losses:
        normed = out._replace(hidden=rms_norm(out.hidden, shared["norm"], config.rms_norm_eps))
        return head_losses(shared, bias, normed, rows, config, execution)

    def without() -> Losses:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(with_heads))
        return nothing._replace(balance_loss=out.balance_loss, load=RouterBias(out.load, nothing.load.mtp), fullness=out.fullness)

    return jax.lax.cond(is_last, with_heads, without)


def _whole_model(losses: Losses, layers: Int[Array, " most"], bias: RouterBias) -> Losses:
    """Losses of a stage with the loads of its layers where the model has them; padding has no load."""
    load = jnp.zeros(bias.moe.shape).at[layers].add(losses.load.moe)
    return losses._replace(load=RouterBias(load, losses.load.mtp))


def micro_batches(rows: Int[Array, "micro b row"], n: Array, counts: Array, mtp_weight: Array, balance_weight: Array) -> MicroBatch:
    """The batch of a step as the pipeline takes it: the first n of its micro-batches are used. The rest as `objective` takes it."""
    M = rows.shape[0]
    everywhere = lambda value: jnp.broadcast_to(value, (M, *jnp.shape(value)))  # noqa: E731
    used = (jnp.arange(M) < n).astype(jnp.float32)
    return MicroBatch(rows, used, everywhere(counts), everywhere(mtp_weight), everywhere(balance_weight))
