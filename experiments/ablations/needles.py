"""A synthetic task of retrieval: a line `>> word` stated in a text and repeated later in it (needle in a haystack).

A small model learns nothing from ordinary text that reaches far back, so the task is mixed into its training text: every such line of
a text has the same word, which can only be told by looking up an earlier one. Words are single tokens, rare ones.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError
from dsv3_jax.training.data import validation_rows
from dsv3_jax.training.tokenizer import encode
from experiments.ablations.study import Text

MARK = ">>"
_SHARE = 0.5  # most lines that a needle follows; texts have any share below, so that some repeats are far off
_BARE = 0.3  # texts that are needles alone: copying is learnt from them first, looking far back after that
_LENGTH = 10  # characters of a needle, about
_MOST, _FEWEST = 32, 8  # words
_WORD = re.compile(r"Ġ[a-z]{2,}")  # Ġ: how byte-level BPE spells a space


def choose_words(tokenizer: Tokenizer) -> list[str]:
    """The words that became tokens last, with the space before them. Raises ConfigError where too few are one token."""
    ids = tokenizer.get_vocab()
    words = [" " + token[1:] for token in sorted(ids, key=ids.__getitem__, reverse=True) if _WORD.fullmatch(token)]
    words = [word for word, of_word in zip(words, encode(tokenizer, words), strict=True) if len(of_word) == 1]
    if len(words) < _FEWEST:
        remedy = f"only {len(words)} words are one token, needles take {_FEWEST}; raise it"
        raise ConfigError("config.model.vocab_size", tokenizer.get_vocab_size(), remedy)
    return words[:_MOST]


@dataclass(frozen=True)
class WithNeedles:
    """Texts with the same needle after some of their lines, another one in each text; some texts give way to needles alone."""

    texts: Sequence[str]
    words: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> str:
        rng, text = random.Random(index), self.texts[index]
        needle = f"{MARK}{rng.choice(self.words)}\n"
        if rng.random() < _BARE:
            return needle * max(1, len(text) // _LENGTH)
        share = rng.uniform(0, _SHARE)
        return "".join(line + needle * (rng.random() < share) for line in text.splitlines(keepends=True))


def make_haystacks(
    text: Text, words: Sequence[str], multiple: int, length: int, depths: Sequence[float], trials: int
) -> Int[np.ndarray, "n t"]:
    """Held-out rows of `multiple` x `length` tokens with a needle hidden in each: `trials` of them at the first depth, then at the next.

    Raises ConfigError for a multiple that the held-out text, or a needle, does not fit.
    """
    try:
        hay = validation_rows(text.corpus.valid, text.tokenizer, text.vocabulary, multiple * length, trials)
        rows = [hide(hay[i % len(hay)], multiple * length, depth, words, text.tokenizer, seed=i) for depth in depths for i in range(trials)]
    except ConfigError as error:
        raise ConfigError("--lengths", multiple, f"for haystacks of {multiple * length} tokens {error.remedy}") from error
    return np.stack(rows)


def hide(
    text: Int[np.ndarray, " n"], length: int, depth: float, words: Sequence[str], tokenizer: Tokenizer, seed: int
) -> Int[np.ndarray, " t"]:
    """`length` tokens: text with a needle at `depth` (0: first, 1: last), then the mark again and the needle's word.

    Raises ConfigError for a length that has no room for that.
    """
    word = random.Random(seed).choice(words)
    needle, question, answer = encode(tokenizer, [f"\n{MARK}{word}\n", f"\n{MARK}", word])
    room = length - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ConfigError("config.train.sequence_length", length, f"needle and question have {length - room} tokens; raise it")
    place = round(depth * room)
    return np.array([*text[:place], *needle, *text[place:room], *question, *answer], np.int32)
