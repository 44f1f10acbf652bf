"""Runs a pipeline schedule on the `pipe` axis of a mesh: one program for all ranks, compiled once.

The schedule is a table (`ticks.lower`). A `lax.scan` over its rows plays it: in each tick a rank takes one of the
schedule's actions with `lax.switch`, then neighbours exchange what they computed with `ppermute`, in both directions.
A forward and a backward pass that the schedule overlaps are in one branch, with nothing between them, so that XLA may
run the communication of one beside the products of the other.

What is kept of a micro-batch on a stage is the stage's *input*, until its last backward pass, and the gradient of its
output while that waits. The rest is computed again:

    F   runs the stage
    B   runs the stage again, then its whole `jax.vjp`
    I   runs the stage again, then the `jax.vjp` towards its input
    W   runs the stage again, then the `jax.vjp` towards its parameters

A B split into I and W thus runs the stage, and the gradients between its layers, once more than a B.
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


class StageOutput(NamedTuple):
    """What a stage makes of its input."""

    y: Float[Array, "..."]  # for the next stage; not read after the last
    loss: Float[Array, ""]  # its own part of the loss; parts of stages and micro-batches add up
    metrics: PyTree  # to be added up over micro-batches, without gradient


class StageParams(NamedTuple):
    """Parameters that one rank holds."""

    own: tuple[PyTree, ...]  # of its stage in each direction
    shared: PyTree  # used by all its stages


class PipelineOutput(NamedTuple):
    """Sums over the passes of one rank; what other ranks have to add is theirs."""

    loss: Float[Array, ""]
    gradients: StageParams
    metrics: tuple[PyTree, ...]  # of its stage in each direction


# stage(own, shared, x, micro_batch, stage index): pure; x is all zeros on stage 0.
Stage = Callable[[Any, Any, Array, Any, Int[Array, ""]], StageOutput]
Addition = Callable[[Any, Any], Any]  # of two trees of metrics; zeros must change nothing


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
    buffers = {payload: jnp.zeros((count, *activation.shape), activation.dtype) for payload, count in ticks.slots.items()}
    rank = jax.lax.axis_index(PIPE_AXIS)
    arrivals = list(ticks.arrivals.values())
    rows = jax.tree.map(lambda table: jnp.asarray(table)[:, rank], (ticks.action, ticks.operands, arrivals))

    def tick(carry: tuple[dict[str, Array], PipelineOutput], row: PyTree) -> tuple[tuple[dict[str, Array], PipelineOutput], None]:
        buffers, sums = carry
        action, operands, slots = row
        results, sums = jax.lax.switch(action, branches, operands, buffers, sums)
        return (_exchange(buffers, results, dict(zip(ticks.arrivals, slots, strict=True)), schedule.n_ranks), sums), None

    (_, sums), _ = jax.lax.scan(tick, (buffers, passes.no_sums(activation)), rows)
    return sums


def _exchange(buffers: dict[str, Array], results: dict[str, Array], slots: dict[Channel, Array], ranks: int) -> dict[str, Array]:
    """Sends what was computed to the neighbours, and puts what they send into its slots."""
    for channel, slot in slots.items():
        value = results[channel.payload]
        if channel.shift:
            pairs = [(rank, rank + channel.shift) for rank in range(ranks) if 0 <= rank + channel.shift < ranks]
            value = jax.lax.ppermute(value, PIPE_AXIS, pairs)
        buffers = buffers | {channel.payload: buffers[channel.payload].at[slot].set(value)}
    return buffers


class _Passes:
    """The passes of one rank over its own parameters, as branches of a switch."""

    def __init__(self, schedule: Schedule, stage: Stage, params: StageParams, batch: PyTree, add_metrics: Addition):
        self._schedule, self._params, self._batch, self._add_metrics = schedule, params, batch, add_metrics
        # Under jit a pass is traced once, and not again for each branch that has it.
        self._forward = jax.jit(functools.partial(_forward, stage))
        self._backward = {kind: jax.jit(functools.partial(_backward, stage, kind)) for kind in "BIW"}
        self._metrics = lambda *inputs: stage(*inputs).metrics

    def no_sums(self, activation: jax.ShapeDtypeStruct) -> PipelineOutput:
        zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)  # noqa: E731
        x = zeros(activation)
        metrics = [jax.eval_shape(self._metrics, *self._inputs(d, x, jnp.int32(0))) for d in self._schedule.directions]
        return PipelineOutput(jnp.zeros(()), zeros(self._params), tuple(map(zeros, metrics)))

    def run(
        self, action: Action, operands: dict[str, Operand], buffers: dict[str, Array], sums: PipelineOutput
    ) -> tuple[dict[str, Array], PipelineOutput]:
        """One action: its results for the neighbours, by payload, and the sums with its part."""
        results = {payload: jnp.zeros_like(buffer[0]) for payload, buffer in buffers.items()}
        for kind, direction in action.passes:
            operand = operands["forward" if kind == "F" else "backward"]
            inputs = self._inputs(direction, buffers["activation"][operand.activation], operand.micro_batch)
            if kind == "F":
                results["activation"] = self._forward(*inputs)
            else:
                out = self._backward[kind](buffers["gradient"][operand.gradient], *inputs)
                results["gradient"], sums = out.dx, self._added(sums, direction, out)
        return results, sums

    def _inputs(self, direction: int, x: Array, micro_batch: Array) -> tuple[Any, ...]:
        """What the stage of a direction takes."""
        rank = jax.lax.axis_index(PIPE_AXIS)
        index = rank if direction == 0 else self._schedule.n_stages - 1 - rank
        return self._params.own[direction], self._params.shared, x, jax.tree.map(lambda leaf: leaf[micro_batch], self._batch), index

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


def _forward(stage: Stage, *inputs: Any) -> Array:
    """F."""
    return stage(*inputs).y


def _backward(stage: Stage, kind: str, dy: Array, own: PyTree, shared: PyTree, x: Array, micro: PyTree, index: Array) -> _Gradients:
    """B, I or W."""

    def f(own: PyTree, shared: PyTree, x: Array) -> tuple[tuple[Array, Array], PyTree]:
        out = stage(own, shared, x, micro, index)
        return (out.y, out.loss), out.metrics

    cotangent = dy, jnp.ones(())
    if kind == "W":
        _, vjp, _ = jax.vjp(lambda own, shared: f(own, shared, x), own, shared, has_aux=True)
        return _Gradients(jnp.zeros_like(x), vjp(cotangent), ())
    if kind == "I":
        (_, loss), vjp, metrics = jax.vjp(lambda x: f(own, shared, x), x, has_aux=True)
        (dx,) = vjp(cotangent)
        return _Gradients(dx, (), (loss, metrics))
    (_, loss), vjp, metrics = jax.vjp(f, own, shared, x, has_aux=True)
    d_own, d_shared, dx = vjp(cotangent)
    return _Gradients(dx, (d_own, d_shared), (loss, metrics))


def _add_at(values: tuple, index: int, new: PyTree, addition: Addition) -> tuple:
    return (*values[:index], addition(values[index], new), *values[index + 1 :])
