"""Text for studies of short contexts: documents cut into pieces that fit a row."""

import dataclasses
from collections.abc import Iterator

from dsv3_jax.training.corpus import Documents
from dsv3_jax.training.tokenizer import encode
from experiments.ablations.study import Text

_SAMPLE = 20  # documents that the length of a token is measured on


def pieces(documents: Documents, size: int) -> list[str]:
    """Every document cut at line ends into pieces of at most `size` characters; a longer line is a piece of its own."""
    return [piece for i in range(len(documents)) for piece in _cut(documents[i], size)]


def _cut(document: str, size: int) -> Iterator[str]:
    piece = ""
    for line in document.splitlines(keepends=True):
        if piece and len(piece) + len(line) > size:
            yield piece
            piece = ""
        piece += line
    if piece:
        yield piece


def trained_on(text: Text, documents: Documents) -> Text:
    """The same held-out text and tokenizer, with other documents to train on."""
    return dataclasses.replace(text, corpus=dataclasses.replace(text.corpus, train=documents))


def characters_per_token(text: Text) -> float:
    """Mean length of a token of the training text."""
    documents = text.corpus.train
    sample = [documents[i] for i in range(min(len(documents), _SAMPLE))]
    return sum(map(len, sample)) / sum(map(len, encode(text.tokenizer, sample)))
