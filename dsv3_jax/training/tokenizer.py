"""Byte-level BPE: training it, loading it, and what the rest of the system has to know about its vocabulary.

The tokenizer follows V3 sec. 4.1: byte-level BPE whose pre-tokenizer lets punctuation and line breaks
merge into one token (good compression of code), with DeepSeek-style control tokens for document ends and
fill-in-the-middle. A tokenizer.json made elsewhere works as well, provided that it is byte-level.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.training.corpus import Documents

FILE_NAME = "tokenizer.json"
TRAINING_CHARACTERS = 8_000_000  # more text changes a small vocabulary little and takes longer
FIELD = "config.data.tokenizer"

_EOS, _FIM = "<|eos|>", ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
_SPECIAL_TOKENS = (_EOS, *_FIM, "<|pad|>")
_KNOWN_EOS = (_EOS, "<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>")
_KNOWN_FIM = (  # the tokens before the prefix, the suffix and the middle
    _FIM,
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
_PRE_TOKEN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word with the space or the mark before it
        r"\p{N}{1,3}",  # digits in groups of up to three
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation with the line breaks after it
        r"\s*[\r\n]+",  # blank lines
        r"\s+(?!\S)|\s+",  # indentation, leaving its last space to the word that follows
    )
)
_PUNCTUATION_BREAK = re.compile(r"( ?(?:[^\w\s�]|_)+)([\r\n]+)")  # � marks a token that is no whole number of characters
_PROBE = "Probe: naïve 漢字 🙂\n\t x = 1024;\r\n"


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Facts about a tokenizer's ids.

    `byte_lengths[id]` is the number of UTF-8 bytes of text that a token stands for (0 for control tokens);
    over the ids of an encoded text they add up to the size of that text. `splits` maps every token of
    punctuation + line breaks to the ids of its two halves (V3 sec. 4.1, token boundary bias).
    """

    eos_id: int
    fim_ids: tuple[int, int, int] | None  # before the prefix, the suffix and the middle
    byte_lengths: Int[np.ndarray, " vocab"]
    splits: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, data: DataConfig) -> "Vocabulary":
        """Raises `ConfigError` for a tokenizer that is not byte-level or lacks a control token that `data` needs."""
        eos, fim = _control_tokens(tokenizer)
        if eos is None:
            raise ConfigError(FIELD, data.tokenizer, f"has no end-of-document token; add one of {', '.join(_KNOWN_EOS)}")
        if fim is None and data.fim_rate > 0:
            raise ConfigError("config.data.fim_rate", data.fim_rate, "the tokenizer has no fill-in-the-middle tokens; set it to 0")
        ids = tokenizer.get_vocab()
        byte_lengths = _byte_lengths(tokenizer)
        if byte_lengths[encode(tokenizer, [_PROBE])[0]].sum() != len(_PROBE.encode()):
            raise ConfigError(FIELD, data.tokenizer, "is not a byte-level BPE without prefix space; choose one that is")
        return cls(ids[eos], (ids[fim[0]], ids[fim[1]], ids[fim[2]]) if fim else None, byte_lengths, _splits(tokenizer))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. Control tokens spelt out in a text are encoded as ordinary characters."""
    # Of the tokenizer's encode functions the batched ones release the GIL, so that training goes on meanwhile.
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _control_tokens(tokenizer: Tokenizer) -> tuple[str | None, tuple[str, str, str] | None]:
    eos = next((token for token in _KNOWN_EOS if tokenizer.token_to_id(token) is not None), None)
    fim = next((tokens for tokens in _KNOWN_FIM if all(tokenizer.token_to_id(token) is not None for token in tokens)), None)
    return eos, fim


def _prepared(tokenizer: Tokenizer) -> Tokenizer:
    """Makes a tokenizer encode text as plain text: whole, unpadded, and without reading control tokens from it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos, fim = _control_tokens(tokenizer)
    tokenizer.add_special_tokens([token for token in (eos, *(fim or ())) if token is not None])  # some files list them as ordinary
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_lengths(tokenizer: Tokenizer) -> Int[np.ndarray, " vocab"]:
    """Bytes per token. The byte-level alphabet spells every byte as one character, added tokens are spelt as they are."""
    ids = tokenizer.get_vocab(with_added_tokens=False)
    lengths = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int32)
    lengths[list(ids.values())] = [len(token) for token in ids]
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        lengths[token_id] = 0 if token.special else len(token.content.encode())
    return lengths


def _splits(tokenizer: Tokenizer) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    decoder, added = decoders.ByteLevel(), tokenizer.get_added_tokens_decoder()
    texts = {token_id: decoder.decode([token]) for token, token_id in tokenizer.get_vocab().items() if token_id not in added}
    found = {token_id: match for token_id, text in sorted(texts.items()) if (match := _PUNCTUATION_BREAK.fullmatch(text))}
    left = encode(tokenizer, [match[1] for match in found.values()])
    right = encode(tokenizer, [match[2] for match in found.values()])
    return {token_id: (tuple(a), tuple(b)) for token_id, a, b in zip(found, left, right, strict=True)}


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same documents in the same order give the same tokenizer.

    The result has `vocab_size` tokens, or fewer where the text has too few pairs left to merge.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError("config.model.vocab_size", vocab_size, f"must be at least {smallest}: all bytes and the control tokens")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_PRE_TOKEN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _prepared(tokenizer)


def load_or_train_tokenizer(workdir: Path, data: DataConfig, vocab_size: int, documents: Documents) -> Tokenizer:
    """The tokenizer of a run: the one in its workdir, else `data.tokenizer`, else one trained on `documents`.

    The workdir has it as tokenizer.json afterwards. Raises `ConfigError` for a file that cannot be used with
    `vocab_size`, and where the workdir holds another tokenizer than `data.tokenizer`.
    """
    path = workdir / FILE_NAME
    given = _load(Path(data.tokenizer), FIELD, data.tokenizer, vocab_size) if data.tokenizer else None
    kept = _load(path, "workdir", str(workdir), vocab_size) if path.exists() else None
    if given and kept and given.to_str() != kept.to_str():
        raise ConfigError(FIELD, data.tokenizer, f"is not the tokenizer that this run was started with ({path}); use a new workdir")
    if kept:
        return kept
    tokenizer = given or train_tokenizer(_sample(documents, TRAINING_CHARACTERS), vocab_size)
    Vocabulary.from_tokenizer(tokenizer, data)  # rejects an unfit file before anything is written
    _save(tokenizer, path)
    return tokenizer


def _load(path: Path, field: str, value: str, vocab_size: int) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(field, value, f"there is no file {path}; give the path of a tokenizer.json, or leave it empty to train one")
    try:
        tokenizer = _prepared(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(field, value, f"{path} is not a tokenizer.json ({error}); replace it or remove it") from error
    size = max(tokenizer.get_vocab().values()) + 1
    if size > vocab_size:
        raise ConfigError(field, value, f"has {size} tokens, config.model.vocab_size = {vocab_size} is too small for them; raise that")
    return tokenizer


def _save(tokenizer: Tokenizer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(draft, path)


def spread_order(count: int) -> Int[np.ndarray, " count"]:
    """A fixed order in which any leading part is spread over all of 0..count-1."""
    return np.random.default_rng(0).permutation(count)


def _sample(documents: Documents, budget: int) -> Iterator[str]:
    """Documents from all over the collection until `budget` characters are reached, the last one cut to fit."""
    left = budget
    for index in tqdm(spread_order(len(documents)), "Training tokenizer", delay=1, leave=False):
        text = documents[int(index)][:left]
        yield text
        left -= len(text)
        if left == 0:
            return
