"""Held-out lines to fill in: what the study of FIM scores a model on."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dsv3_jax.config import ConfigError
from dsv3_jax.training.data import arrange_fim
from dsv3_jax.training.tokenizer import encode
from experiments.ablations.study import Text

LONGEST = 16  # tokens of a line to fill in


class Problems(NamedTuple):
    """Rows that hold a middle, and where: positions of its tokens, with the end of document as the last."""

    rows: Int[np.ndarray, "n t"]
    at: Int[np.ndarray, "n k"]  # filled up with 1
    counts: Bool[np.ndarray, "n k"]  # False for what fills up
    ends: Int[np.ndarray, " n"]  # index into k of the end of document


def make_problems(text: Text, held_out: Sequence[str], length: int, most: int) -> tuple[Problems, Problems]:
    """At most `most` held-out pieces with a line taken out, in PSM order and as prefix and middle alone; the same ones every time.

    Raises ConfigError where no piece has a line that fits.
    """
    rng, order, fim_ids = random.Random(0), list(held_out), text.vocabulary.fim_ids
    assert fim_ids is not None  # a rate above 0 refuses a tokenizer without them
    rng.shuffle(order)
    infix, after_prefix = list[tuple[list[int], list[int]]](), list[tuple[list[int], list[int]]]()
    for piece in order:
        prefix, middle, suffix = (encode(text.tokenizer, [part])[0] for part in _take_line(piece, rng))
        before = arrange_fim((prefix, [], suffix), fim_ids)
        if len(infix) < most and 0 < len(middle) <= LONGEST and prefix and len(before) + len(middle) < length:
            infix.append((before, [*middle, text.vocabulary.eos_id]))
            after_prefix.append((prefix, [*middle, text.vocabulary.eos_id]))
    if not infix:
        raise ConfigError("config.train.sequence_length", length, "no held-out piece of that length has a line to fill in; raise it")
    return _packed(infix, length), _packed(after_prefix, length)


def _take_line(piece: str, rng: random.Random) -> tuple[str, str, str]:
    """Prefix, middle and suffix: the middle is a line without its indentation and its end."""
    lines = piece.splitlines(keepends=True)
    chosen = rng.randrange(len(lines))
    line = lines[chosen]
    middle = line.strip()
    start = sum(map(len, lines[:chosen])) + line.find(middle)
    return piece[:start], middle, piece[start + len(middle) :]


def _packed(problems: Sequence[tuple[list[int], list[int]]], length: int) -> Problems:
    """Pairs of what comes before and of the tokens to predict, as arrays; what follows them does not matter."""
    rows, at = np.zeros((len(problems), length), np.int32), np.ones((len(problems), LONGEST + 1), np.int64)
    sizes = np.array([len(middle) for _, middle in problems])
    for row, places, (before, middle) in zip(rows, at, problems, strict=True):
        row[: len(before) + len(middle)] = [*before, *middle]
        places[: len(middle)] = len(before) + np.arange(len(middle))
    return Problems(rows, at, np.arange(LONGEST + 1) < sizes[:, None] - 1, sizes - 1)
