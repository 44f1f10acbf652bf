"""One optimizer step and one evaluation pass, as pure functions to be jitted once.

Micro-batches are accumulated by a loop whose trip count is an argument, so a growing batch (V3 sec. 4.2)
never recompiles. A step whose loss or gradient is not finite leaves parameters, moments and bias alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.loss import HeadSums, Losses, compute_losses, objective, target_counts
from dsv3_jax.model.router import update_bias
from dsv3_jax.model.transformer import Execution, Params, RouterBias
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


TrainStep = Callable[[TrainState, Int[Array, "micro b row"], Int[Array, ""], Rates], tuple[TrainState, StepMetrics]]


def make_train_step(config: Config, execution: Execution, optimizer: optax.GradientTransformation) -> TrainStep:
    """`step(state, rows, n, rates)`: uses the first n micro-batches of `rows` [micro, b, T + 1]."""
    model = config.model

    def gradients(params: Params, bias: RouterBias, rows: Array, counts: Array, rates: Rates, n: Array) -> tuple[Params, Losses]:
        def loss(p: Params) -> tuple[Array, Losses]:
            losses = compute_losses(p, bias, rows, model, execution)
            return objective(losses, counts, rates.mtp_loss_weight, model.aux_loss_alpha / n), losses

        return jax.grad(loss, has_aux=True)(params)

    def step(state: TrainState, rows: Array, n: Array, rates: Rates) -> tuple[TrainState, StepMetrics]:
        used = jnp.arange(rows.shape[0]) < n
        counts = (jax.vmap(lambda r: target_counts(r, model, execution))(rows) * used[:, None]).sum(0)
        micro = lambda i: gradients(state.params, state.router_bias, rows[i], counts, rates, n)  # noqa: E731
        grads, losses = _sum_over(micro, n, rows.shape[0])
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(losses.main.nll)
        new_state = _apply(state, grads, losses.load, rates, finite, optimizer)
        return new_state, StepMetrics(losses.main, losses.mtp, losses.balance_loss / n, losses.load, grad_norm, new_state.skipped_in_a_row)

    return step


def _sum_over(f: Callable[[Any], Any], n: Array, largest: int) -> Any:
    """Sum of f(0) .. f(n - 1); without a loop when there can only be one."""
    if largest == 1:
        return f(0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, 0))
    return jax.lax.fori_loop(0, n, lambda i, total: jax.tree.map(jnp.add, total, f(i)), zeros)


def _apply(
    state: TrainState, grads: Params, load: RouterBias, rates: Rates, finite: Array, optimizer: optax.GradientTransformation
) -> TrainState:
    direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rates.learning_rate * d, state.params, direction)
    bias = jax.tree.map(lambda b, one_load: update_bias(b, one_load, rates.bias_update_speed), state.router_bias, load)
    old = (state.params, state.opt_state, state.router_bias)
    params, opt_state, bias = jax.tree.map(lambda new, before: jnp.where(finite, new, before), (params, opt_state, bias), old)
    return TrainState(state.step + 1, params, opt_state, bias, jnp.where(finite, 0, state.skipped_in_a_row + 1))


def make_eval_step(config: Config, execution: Execution) -> Callable[[Params, RouterBias, Int[Array, "b row"]], Losses]:
    """Losses of a batch of rows, without gradients."""

    def evaluate(params: Params, bias: RouterBias, rows: Array) -> Losses:
        return compute_losses(params, bias, rows, config.model, execution)

    return evaluate
