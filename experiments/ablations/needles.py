"""A synthetic task of retrieval: lines `>> key value`, stated in a text and repeated later in it (needle in a haystack).

A small model learns nothing from ordinary text that reaches far back, so the task is mixed into its training text: a repeated line
can only be completed by looking up the earlier one. Keys and values are words of the vocabulary, one token each.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError
from dsv3_jax.training.tokenizer import encode

MARK = ">>"
OTHERS = 3  # needles with other keys in a haystack: whoever takes any value is right once in four times
_REPEATS = 0.67  # share of needles that repeat an earlier one
_BARE = 0.7  # share of texts that are needles alone: with fewer of them looking up is learnt much later
_AFTER_LINE = 2  # needles after a line of text, on average
_LENGTH = 12  # characters of a needle, about
_WORDS = 64  # keys, and as many values
_FEWEST = 16
_WORD = re.compile(r"Ġ[a-z]{2,}")  # Ġ: how byte-level BPE spells a space


class Words(NamedTuple):
    """Disjoint words for keys and for values, each with the space before it."""

    keys: Sequence[str]
    values: Sequence[str]


def choose_words(tokenizer: Tokenizer) -> Words:
    """The same words every time. Raises ConfigError for a vocabulary with too few words that are one token."""
    words = sorted(" " + token[1:] for token in tokenizer.get_vocab() if _WORD.fullmatch(token))
    words = [word for word, ids in zip(words, encode(tokenizer, words), strict=True) if len(ids) == 1]
    if len(words) < _FEWEST:
        remedy = f"only {len(words)} words are one token, needles take {_FEWEST}; raise it"
        raise ConfigError("config.model.vocab_size", tokenizer.get_vocab_size(), remedy)
    random.Random(0).shuffle(words)
    return Words(words[: 2 * _WORDS : 2], words[1 : 2 * _WORDS : 2])


@dataclass(frozen=True)
class WithNeedles:
    """Texts with needles after their lines; most texts give way to needles alone."""

    texts: Sequence[str]
    words: Words

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> str:
        rng, text = random.Random(index), self.texts[index]
        lines = [""] * (len(text) // (_AFTER_LINE * _LENGTH)) if rng.random() < _BARE else text.splitlines(keepends=True)
        needles = _needles(self.words, rng)
        return "".join(line + "".join(itertools.islice(needles, rng.randrange(2 * _AFTER_LINE + 1))) for line in lines)


def _needles(words: Words, rng: random.Random) -> Iterator[str]:
    """Endless lines; most repeat one before them, and all do once every key is used."""
    keys, stated = rng.sample(words.keys, len(words.keys)), list[str]()
    while True:
        if keys and (not stated or rng.random() > _REPEATS):
            stated.append(_line(keys.pop(), rng.choice(words.values)))
            yield stated[-1]
        else:
            yield rng.choice(stated)


def _line(key: str, value: str) -> str:
    return f"{MARK}{key}{value}\n"


def hide(text: Int[np.ndarray, " n"], length: int, depth: float, words: Words, tokenizer: Tokenizer, seed: int) -> Int[np.ndarray, " t"]:
    """`length` tokens: text with a needle at `depth` (0: first, 1: last) and others anywhere, then its key again and its value.

    Raises ConfigError for a length that has no room for that.
    """
    rng = random.Random(seed)
    keys, values = rng.sample(words.keys, 1 + OTHERS), rng.sample(words.values, 1 + OTHERS)
    lines = encode(tokenizer, [f"\n{_line(*pair)}" for pair in zip(keys, values, strict=True)])
    question, answer = encode(tokenizer, [f"\n{MARK}{keys[0]}", values[0]])
    room = length - sum(map(len, [*lines, question, answer]))
    if room < 0:
        raise ConfigError("config.train.sequence_length", length, f"needles and question have {length - room} tokens; raise it")
    where = [round(depth * room), *(rng.randint(0, room) for _ in range(OTHERS))]
    row, done = list[int](), 0
    for place, line in sorted(zip(where, lines, strict=True)):
        row += [*text[done:place], *line]
        done = place
    return np.array([*row, *text[done:room], *question, *answer], np.int32)
