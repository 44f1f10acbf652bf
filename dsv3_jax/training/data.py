"""Rows of tokens: documents are encoded, packed end to end and cut, through grain.

Training text flows through one grain pipeline:

    documents -> encode (fill-in-the-middle, random boundary splits, end-of-document token)
              -> shuffle, anew in every epoch -> streams (document i to stream i mod S) -> concatenate and cut

All randomness is a function of the seed, the document and the epoch, so the position of a stream is a
document number and an offset: it goes into the checkpoint and restoring it replays at most one row. The
number of streams S (`config.data.num_shards`) does not depend on the number of processes; each process reads
a contiguous block of streams, and a batch holds the same rows whatever that number is.
Documents are packed without padding (V3 sec. 4.1); whether attention crosses their borders is not decided here.
"""

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tqdm import tqdm

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.training.corpus import Documents
from dsv3_jax.training.tokenizer import Vocabulary, encode, spread_order

# How far each process reads ahead: 2 MiB of rows, and of short rows no more than the next steps can use.
PREFETCH_TOKENS = 2**19
PREFETCH_ROWS = 64  # of every stream
_VALIDATION_SPREAD = 8  # validation rows are picked from a stretch of text up to that many times as long


# --- One document ---


def cut_for_fim(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Cuts a text at two random characters into prefix, middle and suffix, any of which may be empty."""
    first, second = sorted(rng.integers(0, len(text), size=2, endpoint=True).tolist())
    return text[:first], text[first:second], text[second:]


def arrange_fim(pieces: Sequence[Sequence[int]], fim_ids: tuple[int, int, int]) -> list[int]:
    """Encoded (prefix, middle, suffix) in PSM order (V3 sec. 4.1): `<|fim_begin|> pre <|fim_hole|> suf <|fim_end|> mid`."""
    prefix, middle, suffix = pieces
    begin, hole, end = fim_ids
    return [begin, *prefix, hole, *suffix, end, *middle]


def split_boundaries(ids: Sequence[int], vocabulary: Vocabulary, rate: float, rng: np.random.Generator) -> list[int]:
    """Replaces each token of punctuation + line break by its two halves with probability `rate` (V3 sec. 4.1)."""
    out: list[int] = []
    for token in ids:
        if token in vocabulary.splits and rng.random() < rate:
            left, right = vocabulary.splits[token]
            out += (*left, *right)
        else:
            out.append(token)
    return out


def encode_document(
    text: str, tokenizer: Tokenizer, vocabulary: Vocabulary, data: DataConfig, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """int32 ids of a training document with its end-of-document token, after the random changes that `data` asks for."""
    fim_ids = vocabulary.fim_ids if rng.random() < data.fim_rate else None
    pieces = cut_for_fim(text, rng) if fim_ids else (text,)
    encoded = [split_boundaries(ids, vocabulary, data.boundary_split_rate, rng) for ids in encode(tokenizer, pieces)]
    ids = arrange_fim(encoded, fim_ids) if fim_ids else encoded[0]
    return np.array([*ids, vocabulary.eos_id], np.int32)


# --- Training rows ---


class TrainLoader:
    """Endless rows of `sequence_length + 1` tokens for one process out of `process_count`.

    The rows are made ahead of time in a thread; `state` is the position behind the last row handed out.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        data: DataConfig,
        sequence_length: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        shards = data.num_shards
        if shards % process_count:
            raise ConfigError("config.data.num_shards", shards, f"must be a multiple of the number of processes, {process_count}")
        if len(documents) < shards:
            raise ConfigError("config.data.num_shards", shards, f"must be at most the number of training documents, {len(documents)}")
        self._identity = {"num_shards": shards, "documents": len(documents)}
        self._data = data
        self._streams = range(process_index * shards // process_count, (process_index + 1) * shards // process_count)

        def encode_one(text: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"tokens": encode_document(text, tokenizer, vocabulary, data, rng)}

        self._rows = [iter(_pipeline(documents, encode_one, data, self._streams, sequence_length + 1))]
        self._close = weakref.finalize(self, _close, self._rows)  # a thread that still runs at exit would abort the process

    def next_batch(self, rows: int) -> Int[np.ndarray, "local_rows t"]:
        """This process's part of the next `rows` rows (a multiple of `num_shards`), as int32.

        Every stream gives the same number of rows; those of the first stream come first. Joined in the
        order of processes, the parts are the same batch for any number of processes.
        """
        per_stream, rest = divmod(rows, self._data.num_shards)
        if rest or rows <= 0:
            raise ValueError(f"rows = {rows}: must be a positive multiple of the number of streams, {self._data.num_shards}")
        by_stream = np.stack([next(self._rows[0]) for _ in range(per_stream)], axis=1)
        return by_stream.reshape(-1, by_stream.shape[-1])

    def next_micro_batches(self, used: int, size: int, most: int) -> Int[np.ndarray, "most local_b t"]:
        """This process's part of the next `used` micro-batches of `size` rows, filled up with zeros to `most` of them.

        Every stream gives each micro-batch the same number of rows, those of the first stream first. Joined in the order
        of processes along the second axis, the parts are the same micro-batches for any number of processes.
        """
        by_stream = self.next_batch(used * size).reshape(len(self._streams), used, size // self._data.num_shards, -1)
        rows = by_stream.swapaxes(0, 1).reshape(used, -1, by_stream.shape[-1])
        return np.concatenate([rows, np.zeros((most - used, *rows.shape[1:]), np.int32)])

    def state(self) -> dict[str, Any]:
        """The position as plain JSON data: {"num_shards", "documents", "streams": {stream number: position}}.

        `merge_states` makes one of those of all processes.
        """
        positions = json.loads(json.dumps(self._rows[0].get_state()["parents"]))
        return self._identity | {"streams": {str(s): position for s, position in zip(self._streams, positions, strict=True)}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken. Raises `ConfigError` where the streams or documents are not the same."""
        shards, documents = self._data.num_shards, self._identity["documents"]
        if state["num_shards"] != shards:
            raise ConfigError("config.data.num_shards", shards, f"the run being continued has {state['num_shards']}; set that")
        if state["documents"] != documents:
            remedy = f"has {documents} training documents, the run being continued had {state['documents']}; restore the text"
            raise ConfigError("config.data.source", self._data.source, f"{remedy}, or start in a new workdir")
        self._rows[0].set_state({"parents": [_from_json(state["streams"][str(s)]) for s in self._streams]})

    def close(self) -> None:
        """Stops the thread; the loader is of no use after that. May be called again, and happens by itself at exit."""
        self._close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of the whole text from those of all processes, for any number of processes to `restore`."""
    return {**states[0], "streams": {stream: position for state in states for stream, position in state["streams"].items()}}


def _close(rows: list[Any]) -> None:
    rows.pop().close()  # nothing may keep the iterator alive: grain's own clean-up fails while the interpreter exits


def _pipeline(
    documents: Documents,
    encode_one: Callable[[str, np.random.Generator], dict[str, np.ndarray]],
    data: DataConfig,
    streams: Sequence[int],
    row_length: int,
) -> grain.IterDataset:
    """Endless arrays [stream, row_length], one row of every stream."""
    shuffled = grain.MapDataset.source(documents).seed(data.seed).random_map(encode_one).shuffle()
    rows = [_stream(shuffled[stream :: data.num_shards], row_length) for stream in streams]
    slabs = grain.experimental.ZipIterDataset(rows).map(np.stack)
    ahead = max(1, min(PREFETCH_ROWS, PREFETCH_TOKENS // (len(streams) * row_length)))
    return grain.experimental.ThreadPrefetchIterDataset(slabs, prefetch_buffer_size=ahead)


def _stream(documents: grain.MapDataset, row_length: int) -> grain.IterDataset:
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    encoded = documents.repeat().to_iter_dataset(in_this_thread)
    packed = grain.experimental.ConcatThenSplitIterDataset(encoded, length_struct={"tokens": row_length})
    return packed.map(lambda row: row["tokens"])


def _from_json(position: dict[str, Any]) -> dict[str, Any]:
    """Undoes what JSON does to a packer's state: grain compares its slices with tuples, JSON has only lists."""
    return position | {"remainder_slices": {key: tuple(value) for key, value in position["remainder_slices"].items()}}


# --- Validation rows ---


def validation_rows(
    documents: Documents, tokenizer: Tokenizer, vocabulary: Vocabulary, sequence_length: int, max_rows: int
) -> Int[np.ndarray, "n t"]:
    """At most `max_rows` int32 rows of `sequence_length + 1` tokens, the same ones every time.

    Documents are packed in a fixed order, without random changes; the rows are spread evenly over the packed
    text, so that a few of them already stand for many documents. The end that fills no row is dropped.
    Raises `ConfigError` where there is not enough text for one row.
    """
    row_length = sequence_length + 1
    ids = _validation_tokens(documents, tokenizer, vocabulary, _VALIDATION_SPREAD * max_rows * row_length)
    count = len(ids) // row_length
    if count == 0:
        remedy = f"the held-out text has {len(ids)} tokens, too few for one row; lower this or raise config.data.held_out"
        raise ConfigError("config.train.sequence_length", sequence_length, remedy)
    rows = ids[: count * row_length].reshape(count, row_length)
    return rows[np.linspace(0, count - 1, min(count, max_rows)).astype(np.int64)]


def _validation_tokens(documents: Documents, tokenizer: Tokenizer, vocabulary: Vocabulary, enough: int) -> Int[np.ndarray, " n"]:
    ids: list[int] = []
    for index in tqdm(spread_order(len(documents)), "Encoding held-out text", delay=1, leave=False):
        ids += [*encode(tokenizer, [documents[int(index)]])[0], vocabulary.eos_id]
        if len(ids) >= enough:
            break
    return np.array(ids, np.int32)
