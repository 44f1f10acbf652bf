"""What the studies of routing look at: the experts that a trained model picks for the tokens of given rows."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.picks import picked_experts
from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.evaluate import batches
from dsv3_jax.training.state import TrainState


def check_routed(model: ModelConfig) -> None:
    """Raises ConfigError for a main model without MoE layers: there is nothing to study."""
    if model.num_moe_layers == 0:
        remedy = "leaves no MoE layer, which this study is about; lower it"
        raise ConfigError("config.model.first_k_dense_replace", model.first_k_dense_replace, remedy)


def picks_of(state: TrainState, model: ModelConfig, execution: Execution, rows: Int[np.ndarray, "n row"], batch: int) -> np.ndarray:
    """Experts [layers, n, t, k] of every token in each MoE layer of the main model; rows in batches, the rest is left out."""
    program = _program(model, dataclasses.replace(execution, remat="none"))
    found = [np.asarray(program(state.params, state.router_bias, jnp.asarray(chunk[:, :-1]))) for chunk in batches(rows, batch, 1)]
    layers, _, k = found[0].shape
    return np.concatenate([one.reshape(layers, -1, rows.shape[1] - 1, k) for one in found], axis=1)


@functools.cache
def _program(model: ModelConfig, execution: Execution) -> Callable[..., Array]:
    return jax.jit(lambda params, bias, tokens: picked_experts(params, bias, tokens, model, execution))


def loads_of(picks: Int[np.ndarray, "layers n t k"], n_experts: int) -> Float[np.ndarray, "layers n e"]:
    """How many tokens of each row picked each expert."""
    layers, n = picks.shape[:2]
    row = np.arange(layers * n).reshape(layers, n, 1, 1)
    return np.bincount((row * n_experts + picks).ravel(), minlength=layers * n * n_experts).reshape(layers, n, n_experts).astype(np.float64)


def mutual_information(load: Float[np.ndarray, "domains layers e"]) -> Float[np.ndarray, " layers"]:
    """Of domain and expert, in bits, in each layer; `load` sums to 1 over experts, domains weigh alike."""
    ratio = load / np.where(load.mean(0) > 0, load.mean(0), 1)
    return (load * np.log2(np.where(ratio > 0, ratio, 1))).sum(-1).mean(0)
