"""Runs a pipeline schedule on the `pipe` axis of a mesh: one program for all ranks, compiled once.

The schedule is a table (`ticks.lower`). A `lax.scan` over its rows plays it: in each tick a rank takes one of the
schedule's actions with `lax.switch`, then neighbours exchange what they computed with `ppermute`, in both directions.
A forward and a backward pass that the schedule overlaps are in one branch, with nothing between them, so that XLA may
run the communication of one beside the products of the other.

What is kept of a micro-batch on a stage, until its last backward pass: the stage's input, its output, what the `jax.vjp` of
its `run` needs besides, and the gradient of its output while that waits.

    F   `run`
    B   `score`, its gradients, and the whole `jax.vjp` of `run`
    I   the same towards the stage's input
    W   the same towards parameters

A B split into I and W thus runs `score`, and the gradients between the stage's layers, twice.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.mesh import PIPE_AXIS
from dsv3_jax.parallel.schedules import Schedule
from dsv3_jax.parallel.ticks import Action, Channel, Operand, lower
from dsv3_jax.residuals import Residuals


class Stage(NamedTuple):
    """The program of every stage, in two pure parts. `index` is the number of the stage; x is all zeros on stage 0."""

    # run(own, shared, x, micro_batch, index): y for the next stage, and a report for `score`
    run: Callable[[Any, Any, Array, Any, Int[Array, ""]], tuple[Array, Any]]
    # score(shared, y, report, micro_batch, index): this stage's part of the loss, and metrics. Of both those of stages and
    # micro-batches add up. The loss has gradients, metrics have none.
    score: Callable[[Any, Array, Any, Any, Int[Array, ""]], tuple[Float[Array, ""], Any]]


class StageParams(NamedTuple):
    """Parameters that one rank holds."""

    own: tuple[PyTree, ...]  # of its stage in each direction
    shared: PyTree  # used by all its stages


class PipelineOutput(NamedTuple):
    """Sums over the passes of one rank; what other ranks have to add is theirs."""

    loss: Float[Array, ""]
    gradients: StageParams
    metrics: tuple[PyTree, ...]  # of its stage in each direction


Addition = Callable[[Any, Any], Any]  # of two trees of metrics; zeros must change nothing
Buffers = dict[str, PyTree]  # by payload, slots on a leading axis; or one value of each


def add(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, a, b)


def run_pipeline(
    schedule: Schedule, stage: Stage, params: StageParams, batch: PyTree, activation: jax.ShapeDtypeStruct, add_metrics: Addition = add
) -> PipelineOutput:
    """This rank's part of loss, gradients and metrics of a batch; to be called by every rank, inside `shard_map` over `pipe`.

    Args:
        params: this rank's, for the stages that `Schedule.stage` gives it.
        batch: micro-batches on a leading axis [M, ...], the same on every rank of the pipeline.
        activation: shape and dtype of what stages send one another.
        add_metrics: how metrics of micro-batches add up.

    Raises ConfigError when the mesh's `pipe` axis is not as long as the schedule has ranks.
    """
    if jax.lax.axis_size(PIPE_AXIS) != schedule.n_ranks:
        raise ConfigError(
            "mesh.pipe", jax.lax.axis_size(PIPE_AXIS), f"the schedule has {schedule.n_ranks} ranks; the axis needs as many devices"
        )
    ticks = lower(schedule)
    passes = _Passes(schedule, stage, params, batch, add_metrics)
    branches = [functools.partial(passes.run, action) for action in ticks.actions]
    values, metrics = passes.shapes(activation)
    buffers = {payload: _filled(_MAKE[payload], value, (ticks.slots[payload],)) for payload, value in values.items()}
    rank = jax.lax.axis_index(PIPE_AXIS)
    arrivals = list(ticks.arrivals.values())
    rows = jax.tree.map(lambda table: jnp.asarray(table)[:, rank], (ticks.action, ticks.operands, arrivals))

    def tick(carry: tuple[Buffers, PipelineOutput], row: PyTree) -> tuple[tuple[Buffers, PipelineOutput], None]:
        buffers, sums = carry
        action, operands, slots = row
        results, sums = jax.lax.switch(action, branches, operands, buffers, sums)
        return (_exchange(buffers, results, dict(zip(ticks.arrivals, slots, strict=True)), schedule.n_ranks), sums), None

    (_, sums), _ = jax.lax.scan(tick, (buffers, passes.no_sums(metrics)), rows)
    return sums


def _exchange(buffers: Buffers, results: Buffers, slots: dict[Channel, Array], ranks: int) -> Buffers:
    """Sends what was computed to the neighbours, and puts what they send into its slots."""
    for channel, slot in slots.items():
        value = results[channel.payload]
        if channel.shift:
            pairs = [(rank, rank + channel.shift) for rank in range(ranks) if 0 <= rank + channel.shift < ranks]
            value = jax.lax.ppermute(value, PIPE_AXIS, pairs)
        put = lambda buffer, new, slot=slot: buffer.at[slot].set(new)  # noqa: E731
        buffers = buffers | {channel.payload: jax.tree.map(put, buffers[channel.payload], value)}
    return buffers


class _Passes:
    """The passes of one rank over its own parameters, as branches of a switch."""

    def __init__(self, schedule: Schedule, stage: Stage, params: StageParams, batch: PyTree, add_metrics: Addition):
        self._schedule, self._params, self._batch, self._add_metrics = schedule, params, batch, add_metrics
        residuals = Residuals()
        # Under jit a pass is traced once, and not again for each branch that has it.
        self._forward = jax.jit(functools.partial(_forward, stage, residuals))
        self._backward = {kind: jax.jit(functools.partial(_backward, stage, residuals, kind)) for kind in "BIW"}
        self._metrics = lambda kept, own, shared, x, *rest: stage.score(shared, kept.y, kept.report, *rest)[1]

    def shapes(self, activation: jax.ShapeDtypeStruct) -> tuple[Buffers, PyTree]:
        """Of what waits, by payload, and of a stage's metrics."""
        inputs: Any = self._inputs(0, activation, jnp.int32(0))
        _, kept = jax.eval_shape(self._forward, *inputs)
        return {"activation": activation, "gradient": activation, "kept": kept}, jax.eval_shape(self._metrics, kept, *inputs)

    def no_sums(self, metrics: PyTree) -> PipelineOutput:
        return PipelineOutput(jnp.zeros(()), _filled(jnp.zeros, self._params), tuple(_filled(jnp.zeros, metrics) for _ in self._params.own))

    def run(self, action: Action, operands: dict[str, Operand], buffers: Buffers, sums: PipelineOutput) -> tuple[Buffers, PipelineOutput]:
        """One action: its results for the neighbours and itself, by payload, and the sums with its part."""
        results = {payload: _filled(_MAKE[payload], _at(buffer, 0)) for payload, buffer in buffers.items()}
        for kind, direction in action.passes:
            operand = operands["forward" if kind == "F" else "backward"]
            inputs = self._inputs(direction, buffers["activation"][operand.activation], operand.micro_batch)
            if kind == "F":
                results["activation"], results["kept"] = self._forward(*inputs)
            else:
                out = self._backward[kind](buffers["gradient"][operand.gradient], _at(buffers["kept"], operand.kept), *inputs)
                results["gradient"], sums = out.dx, self._added(sums, direction, out)
        return results, sums

    def _inputs(self, direction: int, x: Array | jax.ShapeDtypeStruct, micro_batch: Array) -> tuple[Any, ...]:
        """What the stage of a direction takes."""
        rank = jax.lax.axis_index(PIPE_AXIS)
        index = rank if direction == 0 else self._schedule.n_stages - 1 - rank
        return self._params.own[direction], self._params.shared, x, _at(self._batch, micro_batch), index

    def _added(self, sums: PipelineOutput, direction: int, new: "_Gradients") -> PipelineOutput:
        if new.params:
            (own, shared), (d_own, d_shared) = sums.gradients, new.params
            sums = sums._replace(gradients=StageParams(_add_at(own, direction, d_own, add), add(shared, d_shared)))
        if new.report:
            loss, metrics = new.report
            sums = sums._replace(loss=sums.loss + loss, metrics=_add_at(sums.metrics, direction, metrics, self._add_metrics))
        return sums


class _Gradients(NamedTuple):
    """What a backward pass adds; empty where it has no such part. Loss and metrics come with dx, so once a micro-batch."""

    dx: Array
    params: tuple[()] | tuple[PyTree, PyTree]
    report: tuple[()] | tuple[Array, PyTree]


class _Kept(NamedTuple):
    """What a forward pass keeps of a micro-batch for the backward passes of its stage."""

    y: Array
    report: PyTree
    residuals: list[Array]  # of `run`


def _forward(stage: Stage, residuals: Residuals, own: PyTree, shared: PyTree, x: Array, micro: PyTree, index: Array) -> tuple[Array, _Kept]:
    """F."""
    (y, report), pull = jax.vjp(lambda own, shared, x: stage.run(own, shared, x, micro, index), own, shared, x)
    return y, _Kept(y, report, residuals.take(pull, (own, shared, x, micro, index)))


def _backward(
    stage: Stage,
    residuals: Residuals,
    kind: str,
    dy: Array,
    kept: _Kept,
    own: PyTree,
    shared: PyTree,
    x: Array,
    micro: PyTree,
    index: Array,
) -> _Gradients:
    """B, I or W. What a kind does not return is not computed: the compiler finds that nobody reads it."""
    score = lambda shared, y, report: stage.score(shared, y, report, micro, index)  # noqa: E731
    loss, pull_score, metrics = jax.vjp(score, shared, kept.y, kept.report, has_aux=True)
    of_score, dy_here, d_report = pull_score(jnp.ones(()))
    pull = residuals.restore(kept.residuals, (own, shared, x, micro, index))
    d_own, of_run, dx = pull((dy + dy_here, d_report))
    if kind == "W":
        return _Gradients(jnp.zeros_like(x), (d_own, add(of_score, of_run)), ())
    return _Gradients(dx, (d_own, add(of_score, of_run)) if kind == "B" else (), (loss, metrics))


_MAKE = {"activation": jnp.zeros, "gradient": jnp.zeros, "kept": jax.lax.empty}  # what is kept is written before it is read


def _filled(make: Callable[..., Array], like: PyTree, slots: tuple[int, ...] = ()) -> PyTree:
    return jax.tree.map(lambda leaf: make((*slots, *leaf.shape), leaf.dtype), like)


def _at(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _add_at(values: tuple, index: int, new: PyTree, addition: Addition) -> tuple:
    return (*values[:index], addition(values[index], new), *values[index + 1 :])
