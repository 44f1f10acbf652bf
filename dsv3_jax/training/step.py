"""One optimizer step and one evaluation pass, as pure functions to be jitted once.

Gradients and losses are made by a function of one device's rows under `shard_map`, so every exchange between devices is
written out: weights gathered, tokens dispatched, gradients and counts summed. A mesh of one device is the same code.

Micro-batches are accumulated by a loop whose trip count is an argument, so a growing batch (V3 sec. 4.2)
never recompiles; on a mesh with ranks along `pipe` a pipeline schedule takes the loop's place. A step whose loss or gradient
is not finite leaves parameters, moments and bias alone; one whose tokens did not fit the dispatch buffers (`fullness` above 1)
leaves everything as it was, to be made again with larger ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.loss import HeadSums, Losses, add_losses, compute_losses, objective, target_counts
from dsv3_jax.model.router import update_bias
from dsv3_jax.model.transformer import Execution, Params, RouterBias
from dsv3_jax.parallel.mesh import PIPE_AXIS
from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.training.pipeline_step import micro_batches, pipelined_gradients
from dsv3_jax.training.spread import Spread
from dsv3_jax.training.state import TrainState


class Rates(NamedTuple):
    """What the schedules set for a step."""

    learning_rate: Float[Array, ""]
    bias_update_speed: Float[Array, ""]
    mtp_loss_weight: Float[Array, ""]


class StepMetrics(NamedTuple):
    """What a step reports, summed over its micro-batches."""

    main: HeadSums
    mtp: list[HeadSums]
    balance_loss: Float[Array, ""]  # mean over micro-batches of the sum over layers
    load: RouterBias  # tokens each expert received
    grad_norm: Float[Array, ""]
    skipped_in_a_row: Int[Array, ""]  # 0: this step was applied
    fullness: Float[Array, ""]  # of the fullest dispatch buffer; above 1: nothing was done


TrainStep = Callable[[TrainState, Int[Array, "micro b row"], Int[Array, ""], Rates], tuple[TrainState, StepMetrics]]


def make_train_step(config: Config, execution: Execution, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainStep:
    """`step(state, rows, n, rates)`: uses the first n micro-batches of `rows` [micro, b, T + 1]. mesh None: one device."""
    # Only here: batches of an evaluation need not have two rows a device, and gain little.
    spread = Spread.of(config, dataclasses.replace(execution, overlap=config.parallel.overlap), mesh)
    gradients = spread.over_rows(_make_gradients(config, spread), micro_batches=True, scalars=2, returns_gradients=True)

    def step(state: TrainState, rows: Array, n: Array, rates: Rates) -> tuple[TrainState, StepMetrics]:
        grads, losses = gradients(state.params, state.router_bias, rows, n, rates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(losses.main.nll)
        new_state = _apply(state, grads, losses, rates, finite, optimizer)
        balance_loss, skipped = losses.balance_loss / n, new_state.skipped_in_a_row
        return new_state, StepMetrics(losses.main, losses.mtp, balance_loss, losses.load, grad_norm, skipped, losses.fullness)

    return step


def jit_train_step(step: TrainStep, out_shardings: Any = None) -> Any:
    """The step jitted as training runs it: in place of its state."""
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def _make_gradients(config: Config, spread: Spread) -> Callable[..., tuple[Params, Losses]]:
    """Of one device's rows: master parts of the whole batch's gradient, and the batch's losses."""
    model, execution = config.model, spread.execution
    add_up = _through_the_pipeline if spread.ranks > 1 else _one_after_another

    def gradients(params: Params, bias: RouterBias, rows: Array, n: Array, rates: Rates) -> tuple[Params, Losses]:
        used = jnp.arange(rows.shape[0]) < n
        counts = spread.sum((jax.vmap(lambda r: target_counts(r, model, execution))(rows) * used[:, None]).sum(0))
        weights = counts, rates.mtp_loss_weight, model.aux_loss_alpha / (n * spread.devices)
        grads, losses = add_up(config, spread, params, bias, rows, n, weights)
        return grads, spread.sum_losses(losses)

    return gradients


_Weights = tuple[Array, Array, Array]  # of the parts of `objective`


def _one_after_another(
    config: Config, spread: Spread, params: Params, bias: RouterBias, rows: Array, n: Array, weights: _Weights
) -> tuple[Params, Losses]:
    def loss(p: Params, rows: Array) -> tuple[Array, Losses]:
        losses = compute_losses(spread.at_use(p), bias, rows, config.model, spread.execution)
        return objective(losses, *weights), losses

    held = spread.before_loop(params)

    def micro(i: Array | int) -> tuple[Params, Losses]:
        grads, losses = jax.grad(loss, has_aux=True)(held, rows[i])
        return spread.after_micro_batch(grads), losses

    grads, losses = _sum_over(micro, n, rows.shape[0])
    return spread.after_loop(grads), losses


def _through_the_pipeline(
    config: Config, spread: Spread, params: Params, bias: RouterBias, rows: Array, n: Array, weights: _Weights
) -> tuple[Params, Losses]:
    schedule = make_schedule(config.parallel.schedule, spread.ranks, rows.shape[0])
    return pipelined_gradients(params, bias, micro_batches(rows, n, *weights), schedule, config.model, spread.execution, spread.places)


def _sum_over(f: Callable[[Any], tuple[Params, Losses]], n: Array, largest: int) -> tuple[Params, Losses]:
    """Sum of f(0) .. f(n - 1); without a loop when there can only be one."""
    if largest == 1:
        return f(0)
    traced, held = jax.closure_convert(f, jnp.int32(0))  # once, for its shapes and for the loop
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(traced, jnp.int32(0), *held))

    def add(i: Array, total: tuple[Params, Losses]) -> tuple[Params, Losses]:
        grads, losses = traced(i, *held)
        return jax.tree.map(jnp.add, total[0], grads), add_losses(total[1], losses)

    return jax.lax.fori_loop(0, n, add, zeros)


def _apply(
    state: TrainState, grads: Params, losses: Losses, rates: Rates, finite: Array, optimizer: optax.GradientTransformation
) -> TrainState:
    direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rates.learning_rate * d, state.params, direction)
    bias = jax.tree.map(lambda b, one_load: update_bias(b, one_load, rates.bias_update_speed), state.router_bias, losses.load)
    fits = losses.fullness <= 1
    old = (state.params, state.opt_state, state.router_bias)
    params, opt_state, bias = jax.tree.map(lambda new, before: jnp.where(finite & fits, new, before), (params, opt_state, bias), old)
    skipped = jnp.where(fits, jnp.where(finite, 0, state.skipped_in_a_row + 1), state.skipped_in_a_row)
    return TrainState(state.step + fits, params, opt_state, bias, skipped)


def make_eval_step(
    config: Config, execution: Execution, mesh: Mesh | None = None
) -> Callable[[Params, RouterBias, Int[Array, "b row"]], Losses]:
    """Losses of a batch of rows, without gradients. mesh None: one device.

    Ranks of a pipeline evaluate the same rows, each with the whole model; a rank has no room for that, so it gathers a layer at a time.
    """
    pipelined = mesh is not None and mesh.shape[PIPE_AXIS] > 1
    spread = Spread.of(config, execution, mesh, "parameters" if pipelined else None)

    def evaluate(params: Params, bias: RouterBias, rows: Array) -> Losses:
        params = spread.at_use(spread.before_loop(params))
        return spread.sum_losses(compute_losses(params, bias, rows, config.model, spread.execution))

    return spread.over_rows(evaluate, micro_batches=False)
