"""Training and validation rows: random changes of a document, packing, streams, and exact continuation."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.training import data as module
from dsv3_jax.training.data import TrainLoader, arrange_fim, cut_for_fim, encode_document, merge_states, split_boundaries, validation_rows
from dsv3_jax.training.tokenizer import Vocabulary, encode

LENGTH = 32
PLAIN = DataConfig(fim_rate=0.0, boundary_split_rate=0.0, num_shards=4)
CHANGED = DataConfig(fim_rate=0.3, boundary_split_rate=0.5, num_shards=4)


class CountingDocuments:
    """A list of texts that counts how often one is read."""

    def __init__(self, texts: list[str]):
        self.texts, self.reads = texts, 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> str:
        self.reads += 1
        return self.texts[index]


@pytest.fixture
def make_loader(documents, tokenizer, vocabulary) -> Iterator:
    loaders = []

    def make(data: DataConfig = CHANGED, process_index: int = 0, process_count: int = 1, texts=documents) -> TrainLoader:
        loaders.append(TrainLoader(texts, tokenizer, vocabulary, data, LENGTH, process_index, process_count))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


# --- One document ---


@given(text=st.text(max_size=20), seed=st.integers(0, 2**32 - 1))
def test_fim_pieces_join_to_the_text(text: str, seed: int) -> None:
    prefix, middle, suffix = cut_for_fim(text, np.random.default_rng(seed))
    assert prefix + middle + suffix == text


def test_fim_cuts_fall_anywhere() -> None:
    cuts = {(len(a), len(b), len(c)) for a, b, c in (cut_for_fim("abc", np.random.default_rng(seed)) for seed in range(300))}
    assert cuts == {(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)}


def test_fim_order_is_prefix_suffix_middle() -> None:
    assert arrange_fim([[1, 2], [3], [4, 5]], (90, 91, 92)) == [90, 1, 2, 91, 4, 5, 92, 3]


def test_fim_document_decodes_to_the_text(documents: list[str], tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    always = DataConfig(fim_rate=1.0, boundary_split_rate=0.5)
    text = documents[8]
    ids = encode_document(text, tokenizer, vocabulary, always, np.random.default_rng(1))
    begin, hole, end = vocabulary.fim_ids
    order = [token for token in ids.tolist() if token in (begin, hole, end, vocabulary.eos_id)]
    assert order == [begin, hole, end, vocabulary.eos_id] and ids[0] == begin and ids[-1] == vocabulary.eos_id
    prefix, suffix, middle = (tokenizer.decode(part[1:].tolist()) for part in np.split(ids[:-1], np.flatnonzero(np.isin(ids, order))[1:-1]))
    assert prefix + middle + suffix == text and min(len(prefix), len(suffix), len(middle)) > 0


def test_share_of_fim_documents(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    first = [encode_document("x = 1\n", tokenizer, vocabulary, DataConfig(fim_rate=0.1), rng)[0] for _ in range(2000)]
    count = first.count(vocabulary.fim_ids[0])
    assert abs(count - 200) < 4 * np.sqrt(2000 * 0.1 * 0.9)


def test_boundary_splits_keep_the_bytes_and_hit_the_rate(documents: list[str], tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    ids = encode(tokenizer, ["".join(documents)])[0]
    splittable = sum(token in vocabulary.splits for token in ids)
    out = split_boundaries(ids, vocabulary, 0.25, np.random.default_rng(0))
    left = sum(token in vocabulary.splits for token in out)
    assert tokenizer.decode(out) == tokenizer.decode(ids)
    assert abs((splittable - left) - 0.25 * splittable) < 4 * np.sqrt(splittable * 0.25 * 0.75)
    assert splittable > 300
    assert split_boundaries(ids, vocabulary, 0.0, np.random.default_rng(0)) == ids


# --- Training rows ---


def _documents_of(tokens: np.ndarray, eos_id: int) -> list[tuple[int, ...]]:
    """The complete documents in a stretch of tokens that starts at the beginning of one."""
    ends = np.flatnonzero(tokens == eos_id) + 1
    return [tuple(part.tolist()) for part in np.split(tokens, ends)[: len(ends)]]


def test_an_epoch_holds_every_document_once_without_loss(make_loader, documents, tokenizer, vocabulary) -> None:
    rows = make_loader(PLAIN).next_batch(4 * 60).reshape(4, 60, LENGTH + 1)
    per_stream = [_documents_of(stream.reshape(-1), vocabulary.eos_id) for stream in rows]
    expected = sorted((*ids, vocabulary.eos_id) for ids in encode(tokenizer, documents))
    epochs = [[found[15 * epoch : 15 * (epoch + 1)] for found in per_stream] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(document for stream in epoch for document in stream) == expected
    assert epochs[0] != epochs[1]


def test_random_changes_differ_between_epochs_and_documents(make_loader, vocabulary) -> None:
    texts = ["def f(x):\n    return [x, 1];\n\n"] * 8
    loader = make_loader(DataConfig(fim_rate=0.5, num_shards=1), texts=texts)
    found = _documents_of(loader.next_batch(40).reshape(-1), vocabulary.eos_id)
    assert len(set(found[:8])) > 3 and len(set(found)) > len(set(found[:8]))
    share = np.mean([document[0] == vocabulary.fim_ids[0] for document in found])
    assert 0.2 < share < 0.8


def test_rows_are_a_function_of_the_seed(make_loader) -> None:
    first, same = (make_loader(CHANGED).next_batch(8) for _ in range(2))
    other = make_loader(DataConfig(fim_rate=0.3, boundary_split_rate=0.5, num_shards=4, seed=1)).next_batch(8)
    np.testing.assert_array_equal(first, same)
    assert first.shape == (8, LENGTH + 1) and first.dtype == np.int32
    assert (first != other).mean() > 0.5


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(make_loader, processes: int) -> None:
    alone = make_loader()
    parts = [make_loader(process_index=i, process_count=processes) for i in range(processes)]
    for rows in (4, 12, 8):
        np.testing.assert_array_equal(np.concatenate([part.next_batch(rows) for part in parts]), alone.next_batch(rows))


def test_micro_batches_do_not_depend_on_the_number_of_processes(make_loader) -> None:
    alone, rows = make_loader().next_micro_batches(2, 8, 3), make_loader().next_batch(16)
    parts = [make_loader(process_index=i, process_count=2).next_micro_batches(2, 8, 3) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)
    assert alone.shape == (3, 8, LENGTH + 1) and not alone[2].any()
    of_stream = rows.reshape(4, 2, 2, -1)  # stream, micro-batch, row
    np.testing.assert_array_equal(alone[:2], of_stream.swapaxes(0, 1).reshape(2, 8, -1))


def test_rows_of_a_stream_do_not_depend_on_how_they_are_batched(make_loader) -> None:
    at_once, in_parts = make_loader(), make_loader()
    whole = at_once.next_batch(24).reshape(4, 6, -1)
    parts = np.concatenate([in_parts.next_batch(rows).reshape(4, rows // 4, -1) for rows in (8, 4, 12)], axis=1)
    np.testing.assert_array_equal(whole, parts)


def _awkward_texts(tokenizer: Tokenizer, documents: list[str]) -> list[str]:
    """Texts that fill exactly one row, one of many rows, and empty ones, besides the usual."""
    one_row = "a\n" * (LENGTH // 2)
    assert len(encode(tokenizer, [one_row])[0]) == LENGTH
    return [one_row] * 6 + ["".join(documents)] + [""] * 4 + documents[:9]


@settings(max_examples=12, deadline=None)
@given(before=st.lists(st.sampled_from([2, 4, 6]), max_size=14), after=st.lists(st.sampled_from([2, 8]), min_size=1, max_size=4))
def test_continues_exactly(documents, tokenizer, vocabulary, before: list[int], after: list[int]) -> None:
    texts = _awkward_texts(tokenizer, documents)
    data = DataConfig(fim_rate=0.3, boundary_split_rate=0.5, num_shards=2)
    with closing(TrainLoader(texts, tokenizer, vocabulary, data, LENGTH)) as first:
        for rows in before:
            first.next_batch(rows)
        state = json.loads(json.dumps(first.state()))
        expected = [first.next_batch(rows) for rows in after]
        with closing(TrainLoader(texts, tokenizer, vocabulary, data, LENGTH)) as second:
            for loader in (second, first):  # a fresh loader, and one that is sent back
                loader.restore(state)
                assert loader.state() == state
                for rows, batch in zip(after, expected, strict=True):
                    np.testing.assert_array_equal(loader.next_batch(rows), batch)


def test_another_number_of_processes_continues_from_the_merged_state(make_loader) -> None:
    parts = [make_loader(process_index=i, process_count=2) for i in range(2)]
    for part in parts:
        part.next_batch(20)
    alone = make_loader()
    alone.restore(merge_states([part.state() for part in parts]))
    np.testing.assert_array_equal(alone.next_batch(8), np.concatenate([part.next_batch(8) for part in parts]))


def test_restoring_does_not_replay_the_run(make_loader, documents) -> None:
    loader = make_loader()
    loader.next_batch(4 * 200)
    counting = CountingDocuments(documents)
    resumed = make_loader(texts=counting)
    resumed.restore(loader.state())
    assert 0 < counting.reads <= 5 * 4  # a few documents for each of four streams


def test_reading_ahead_is_bounded_and_does_not_move_the_position(monkeypatch: pytest.MonkeyPatch, make_loader) -> None:
    monkeypatch.setattr(module, "PREFETCH_TOKENS", 1)
    slow = make_loader()
    monkeypatch.setattr(module, "PREFETCH_TOKENS", 10_000)
    fast = make_loader()
    for rows in (4, 12):
        np.testing.assert_array_equal(slow.next_batch(rows), fast.next_batch(rows))
        assert slow.state() == fast.state()


def test_close_stops_the_thread(make_loader) -> None:
    before = set(threading.enumerate())
    loader = make_loader()
    loader.next_batch(4)
    thread = set(threading.enumerate()) - before
    assert thread
    loader.close()
    loader.close()
    assert not any(one.is_alive() for one in thread)


@pytest.mark.parametrize("ending", ["", "loader.close()"])
def test_process_ends_cleanly_while_rows_are_being_made(ending: str) -> None:
    script = f"""
from dsv3_jax.config import DataConfig
from dsv3_jax.training.data import TrainLoader
from dsv3_jax.training.tokenizer import Vocabulary, train_tokenizer
texts = ["def f(x):\\n    return x\\n" * 50] * 8
tokenizer = train_tokenizer(texts, 300)
loader = TrainLoader(texts, tokenizer, Vocabulary.from_tokenizer(tokenizer, DataConfig()), DataConfig(), 512)
loader.next_batch(8)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Exception" not in done.stderr, done.stderr


def test_error_of_a_document_reaches_the_caller(make_loader) -> None:
    class Failing(CountingDocuments):
        def __getitem__(self, index: int, /) -> str:
            raise ConfigError("config.data.source", "parquet:x#text", "x:1: column 'text' is null")

    with pytest.raises(ConfigError, match="column 'text' is null"):
        make_loader(texts=Failing(["a"] * 4)).next_batch(4)


def test_unusable_settings_are_named(make_loader) -> None:
    with pytest.raises(ConfigError, match=r"config.data.num_shards = 4: must be a multiple of the number of processes, 3"):
        make_loader(process_count=3)
    with pytest.raises(ConfigError, match=r"config.data.num_shards = 4: must be at most the number of training documents, 3"):
        make_loader(texts=["a", "b", "c"])
    with pytest.raises(ValueError, match="rows = 6: must be a positive multiple"):
        make_loader().next_batch(6)


def test_position_of_other_data_is_refused(make_loader, documents) -> None:
    state = make_loader().state()
    with pytest.raises(ConfigError, match=r"config.data.num_shards = 2: the run being continued has 4"):
        make_loader(DataConfig(num_shards=2)).restore(state)
    with pytest.raises(ConfigError, match=r"config.data.source = 'stdlib': has 59 training documents, .* had 60"):
        make_loader(texts=documents[1:]).restore(state)


# --- Validation rows ---


def test_validation_rows_hold_the_text_as_it_is(documents, tokenizer, vocabulary) -> None:
    rows = validation_rows(documents, tokenizer, vocabulary, LENGTH, max_rows=10_000)
    total = sum(len(ids) + 1 for ids in encode(tokenizer, documents))
    assert rows.shape == (total // (LENGTH + 1), LENGTH + 1) and rows.dtype == np.int32
    found = _documents_of(rows.reshape(-1), vocabulary.eos_id)
    expected = {(*ids, vocabulary.eos_id) for ids in encode(tokenizer, documents)}
    assert len(found) >= 58 and len(set(found)) == len(found) and set(found) <= expected


def test_few_validation_rows_are_spread_over_the_text(documents, tokenizer, vocabulary) -> None:
    rows, again = (validation_rows(documents, tokenizer, vocabulary, LENGTH, max_rows=5) for _ in range(2))
    np.testing.assert_array_equal(rows, again)
    packed = validation_rows(documents, tokenizer, vocabulary, LENGTH, max_rows=10_000)
    positions = [int(np.flatnonzero((packed == row).all(axis=1))[0]) for row in rows]
    assert len(rows) == 5 and min(np.diff(positions)) >= 7


def test_too_little_held_out_text_is_named(tokenizer, vocabulary) -> None:
    with pytest.raises(ConfigError, match=r"config.train.sequence_length = 32: the held-out text has 2 tokens.*config.data.held_out"):
        validation_rows(["a"], tokenizer, vocabulary, LENGTH, 4)
