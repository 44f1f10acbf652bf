"""How a trained model scores given tokens of given rows."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.transformer import Execution, Params, RouterBias, logits, trunk
from dsv3_jax.training.state import TrainState


class Scores(NamedTuple):
    """Of each token, given those before it: negative log-likelihood in nats, and whether it has the highest score."""

    nll: Float[np.ndarray, "n k"]
    hit: Bool[np.ndarray, "n k"]


def score_tokens(
    config: Config, state: TrainState, rows: Int[np.ndarray, "n t"], at: Int[np.ndarray, "n k"], eos_id: int, tokens: int
) -> Scores:
    """Scores the tokens at positions `at` (from 1) of each row, as many rows at once as `tokens` allow, one at least."""
    count, batch = len(rows), max(1, tokens // rows.shape[1])
    whole = -(-count // batch) * batch  # one shape for all batches: the last is filled up with rows from the start
    rows, at = np.resize(rows, (whole, rows.shape[1])), np.resize(at, (whole, at.shape[1]))
    scorer = _scorer(config.model, Execution.of(config, eos_id))
    starts = range(0, whole, batch)
    parts = [jax.device_get(scorer(state.params, state.router_bias, rows[i : i + batch], at[i : i + batch])) for i in starts]
    return Scores(*(np.concatenate(kind)[:count] for kind in zip(*parts, strict=True)))


@functools.cache
def _scorer(model: ModelConfig, execution: Execution) -> Callable[..., tuple[Array, Array]]:
    def score(params: Params, bias: RouterBias, rows: Array, at: Array) -> tuple[Array, Array]:
        hidden = trunk(params, bias, rows, model, execution).hidden
        scores = logits(params, jnp.take_along_axis(hidden, at[..., None] - 1, axis=1))
        targets = jnp.take_along_axis(rows, at, axis=1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]
        return nll, scores.argmax(-1) == targets

    return jax.jit(score)
