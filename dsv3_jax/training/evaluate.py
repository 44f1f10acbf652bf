"""Loss, bits per byte and MTP accuracy of a model on rows of held-out tokens."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.model.loss import HeadSums, Losses
from dsv3_jax.model.mtp import target_weights
from dsv3_jax.model.transformer import Params, RouterBias


class Evaluation(NamedTuple):
    """Means over the evaluated tokens."""

    loss: float  # nats a token
    bits_per_byte: float  # of the text that the tokens stand for
    mtp_accuracy: float | None  # share of second tokens the first MTP head gets right; None without MTP
    tokens: int


EvalStep = Callable[[Params, RouterBias, Int[Array, "b row"]], Losses]


def evaluate(
    step: EvalStep,
    params: Params,
    bias: RouterBias,
    rows: Int[np.ndarray, "n row"],
    batch: int,
    byte_lengths: Int[np.ndarray, " v"],
    document_eos: int | None = None,
    place: Callable[[np.ndarray], Array] = jax.numpy.asarray,
) -> Evaluation:
    """Runs over the rows in batches of one shape; what does not fill a batch is left out, unless it is all there is."""
    heads: list[list[HeadSums]] = []
    used = 0
    for chunk in batches(rows, batch):
        losses = jax.device_get(step(params, bias, place(chunk)))
        heads.append([losses.main, *losses.mtp])
        has_target = np.asarray(target_weights(jax.numpy.asarray(chunk), 0, document_eos))
        used += int((byte_lengths[chunk[:, 1:]] * has_target).sum())
    main = _total([h[0] for h in heads])
    mtp = _total([h[1] for h in heads]) if len(heads[0]) > 1 else None
    return Evaluation(
        float(main.nll / main.tokens),
        float(main.nll / (math.log(2) * used)),
        None if mtp is None else float(mtp.correct / mtp.tokens),
        int(main.tokens),
    )


def batches(rows: Int[np.ndarray, "n row"], batch: int) -> Iterator[Int[np.ndarray, "b row"]]:
    """Rows in whole batches."""
    batch = min(batch, len(rows))
    for start in range(0, len(rows) - batch + 1, batch):
        yield rows[start : start + batch]


def _total(sums: list[HeadSums]) -> HeadSums:
    return HeadSums(*np.asarray(sums, np.float64).sum(0))
