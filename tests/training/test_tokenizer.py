"""Training and loading tokenizers, and the facts that are read off their vocabulary."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.training import tokenizer as module
from dsv3_jax.training.tokenizer import Vocabulary, encode, load_or_train_tokenizer, train_tokenizer

FOREIGN_NAMES = {
    "<|eos|>": "<｜end▁of▁sentence｜>",
    "<|fim_begin|>": "<｜fim▁begin｜>",
    "<|fim_hole|>": "<｜fim▁hole｜>",
    "<|fim_end|>": "<｜fim▁end｜>",
}


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> str:
    """A tokenizer.json with other control tokens, of which only the end of a document is marked as special."""
    description = json.loads(tokenizer.to_str())
    vocab = description["model"]["vocab"]
    description["model"]["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    for token in description["added_tokens"]:
        token["special"] = token["content"] == "<|eos|>"
        token["content"] = names.get(token["content"], token["content"])
    return json.dumps(description)


@settings(max_examples=80, deadline=None)
@given(text=st.text() | st.text("ab1 _(){}[];:.,\n\r\té漢🙂\u0301"))
def test_any_text_round_trips_and_its_bytes_are_counted(tokenizer: Tokenizer, vocabulary: Vocabulary, text: str) -> None:
    ids = encode(tokenizer, [text])[0]
    assert tokenizer.decode(ids) == text
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())


def test_control_tokens_stand_for_no_text_and_are_never_read_from_it(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    assert vocabulary.fim_ids is not None
    controls = [vocabulary.eos_id, *vocabulary.fim_ids, tokenizer.token_to_id("<|pad|>")]
    assert (vocabulary.byte_lengths[controls] == 0).all()
    assert np.count_nonzero(vocabulary.byte_lengths == 0) == len(controls)
    spelt = "a<|eos|><|fim_hole|>"
    ids = encode(tokenizer, [spelt])[0]
    assert not set(ids) & set(controls)
    assert vocabulary.byte_lengths[ids].sum() == len(spelt)


def test_pre_tokens(tokenizer: Tokenizer) -> None:
    def cut(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert cut("f(x);\n\n    return 1234") == ["f", "(x", ");\n\n", "   ", " return", " ", "123", "4"]


def test_splits_cut_punctuation_from_line_breaks(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    pieces = {tokenizer.decode([i]): tuple(tokenizer.decode(list(half)) for half in halves) for i, halves in vocabulary.splits.items()}
    assert pieces["):\n"] == ("):", "\n")
    assert pieces["];\n\n"] == ("];", "\n\n")
    for token, (left, right) in pieces.items():
        assert left + right == token
        assert left.strip() and not any(char.isalnum() for char in left)
        assert set(right) <= {"\r", "\n"} and right


def test_vocabulary_has_the_asked_size_or_what_the_text_gives(documents: list[str]) -> None:
    assert train_tokenizer(documents, 300).get_vocab_size() == 300
    assert train_tokenizer(["ab ab"], 1000).get_vocab_size() < 300
    with pytest.raises(ConfigError, match=r"config.model.vocab_size = 260: must be at least 261"):
        train_tokenizer(documents, 260)


def test_training_is_deterministic(documents: list[str], tokenizer: Tokenizer) -> None:
    assert train_tokenizer(documents, 320).to_str() == tokenizer.to_str()


def test_workdir_keeps_the_tokenizer(tmp_path: Path, documents: list[str]) -> None:
    workdir = tmp_path / "runs" / "x"
    trained = load_or_train_tokenizer(workdir, DataConfig(), 320, documents)
    again = load_or_train_tokenizer(workdir, DataConfig(), 320, [])
    assert again.to_str() == trained.to_str()
    assert encode(again, ["<|eos|>"]) == encode(trained, ["<|eos|>"])
    assert [path.name for path in workdir.iterdir()] == ["tokenizer.json"]


def test_tokenizer_trains_on_a_bounded_sample(documents: list[str]) -> None:
    sample = list(module._sample(documents, 1000))
    assert sum(map(len, sample)) == 1000
    positions = [documents.index(text) for text in sample[:-1]]
    assert min(positions) < 20 and max(positions) >= 40  # not the first documents only
    assert list(module._sample(documents, 10**9)) == [documents[i] for i in module.spread_order(60)]


def test_foreign_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(_renamed(tokenizer, FOREIGN_NAMES))
    data = DataConfig(tokenizer=str(path))
    for _ in range(2):  # the second time the workdir has it already
        foreign = load_or_train_tokenizer(tmp_path / "work", data, 320, [])
    vocabulary = Vocabulary.from_tokenizer(foreign, data)
    assert vocabulary.eos_id == tokenizer.token_to_id("<|eos|>")
    assert vocabulary.fim_ids == tuple(tokenizer.token_to_id(token) for token in list(FOREIGN_NAMES)[1:])
    text = "x <｜fim▁hole｜> é;\n"
    ids = encode(foreign, [text])[0]
    assert not set(ids) & set(vocabulary.fim_ids)
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())


def test_fim_needs_its_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(_renamed(tokenizer, {"<|fim_hole|>": "<|other|>"}))
    with pytest.raises(ConfigError, match=r"config.data.fim_rate = 0.1: .* set it to 0"):
        load_or_train_tokenizer(tmp_path / "work", DataConfig(tokenizer=str(path)), 320, [])
    without = DataConfig(tokenizer=str(path), fim_rate=0.0)
    assert Vocabulary.from_tokenizer(load_or_train_tokenizer(tmp_path / "work", without, 320, []), without).fim_ids is None


def _no_eos(tokenizer: Tokenizer) -> str:
    return _renamed(tokenizer, {"<|eos|>": "<|other|>"})


def _not_byte_level(tokenizer: Tokenizer) -> str:
    return Tokenizer(models.WordLevel({"<|eos|>": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str()


@pytest.mark.parametrize(
    ("content", "vocab_size", "part"),
    [
        (None, 320, "there is no file"),
        (lambda _: "{}", 320, "is not a tokenizer.json"),
        (Tokenizer.to_str, 319, "has 320 tokens, config.model.vocab_size = 319 is too small"),
        (_no_eos, 320, "has no end-of-document token"),
        (_not_byte_level, 320, "is not a byte-level BPE"),
    ],
)
def test_unusable_file_is_named_and_nothing_written(tmp_path: Path, tokenizer: Tokenizer, content, vocab_size: int, part: str) -> None:
    path = tmp_path / "given.json"
    if content:
        path.write_text(content(tokenizer))
    data = DataConfig(tokenizer=str(path), fim_rate=0.0)
    with pytest.raises(ConfigError) as caught:
        load_or_train_tokenizer(tmp_path / "work", data, vocab_size, [])
    assert str(caught.value).startswith(f"config.data.tokenizer = {str(path)!r}: ")
    assert part in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_workdir_of_another_tokenizer(tmp_path: Path, tokenizer: Tokenizer, documents: list[str]) -> None:
    load_or_train_tokenizer(tmp_path, DataConfig(), 300, documents)
    given = tmp_path / "given.json"
    given.write_text(tokenizer.to_str())
    with pytest.raises(ConfigError, match=r"config.data.tokenizer = .*not the tokenizer that this run was started with"):
        load_or_train_tokenizer(tmp_path, DataConfig(tokenizer=str(given)), 320, [])
    with pytest.raises(ConfigError, match=r"workdir = .*has 300 tokens"):
        load_or_train_tokenizer(tmp_path, DataConfig(), 270, [])
