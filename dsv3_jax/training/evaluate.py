"""Loss, bits per byte and MTP accuracy of a model on rows of held-out tokens; logits of given ones."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.files import replacing
from dsv3_jax.model.loss import HeadSums, Losses
from dsv3_jax.model.mtp import target_weights
from dsv3_jax.model.transformer import Execution, Params, RouterBias, logits, trunk


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
    devices: int = 1,
) -> Evaluation:
    """Runs over the rows in batches of one shape; what does not fill a batch is left out, unless it is all there is.

    A batch is a multiple of the `devices` that it is spread over. Raises ConfigError where there are not that many rows.
    """
    heads: list[list[HeadSums]] = []
    used = 0
    for chunk in batches(rows, batch, devices):
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


def batches(rows: Int[np.ndarray, "n row"], batch: int, devices: int) -> Iterator[Int[np.ndarray, "b row"]]:
    """Rows in whole batches."""
    batch = min(batch, len(rows)) // devices * devices
    if batch == 0:
        remedy = f"there are {len(rows)} rows of held-out text for {devices} devices; raise it or data.held_out, or use fewer devices"
        raise ConfigError("config.train.eval_sequences", len(rows), remedy)
    for start in range(0, len(rows) - batch + 1, batch):
        yield rows[start : start + batch]


def _total(sums: list[HeadSums]) -> HeadSums:
    return HeadSums(*np.asarray(sums, np.float64).sum(0))


def write_logits(params: Params, bias: RouterBias, tokens_file: Path, target: Path, config: ModelConfig, execution: Execution) -> None:
    """Writes the scores of the next token, [B, T, V] float32, for the token ids [B, T] of a .npy file, row by row.

    Raises ConfigError for a file that does not hold such ids.
    """
    tokens = _read_tokens(tokens_file, config)

    @jax.jit
    def forward(params: Params, bias: RouterBias, row: Array) -> Array:
        return logits(params, trunk(params, bias, row[None], config, execution).hidden)[0]

    with replacing(target) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (*tokens.shape, config.vocab_size)}
        np.lib.format.write_array_header_1_0(file, header)
        for row in tqdm(tokens, "Logits", unit="row", disable=None):
            file.write(np.asarray(forward(params, bias, jax.numpy.asarray(row, jax.numpy.int32)), "<f4").tobytes())


def _read_tokens(path: Path, config: ModelConfig) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError("--tokens", str(path), f"is no .npy file of token ids: {error}") from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.size == 0:
        raise ConfigError("--tokens", str(path), f"holds {tokens.dtype} {tokens.shape}; must be integers [B, T]")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ConfigError("--tokens", str(path), f"holds ids {tokens.min()}..{tokens.max()}; the vocabulary is 0..{config.vocab_size - 1}")
    if tokens.shape[1] > config.max_position_embeddings:
        raise ConfigError("--tokens", str(path), f"has rows of {tokens.shape[1]}; the model takes {config.max_position_embeddings} tokens")
    return tokens
