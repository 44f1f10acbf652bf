"""Texts, needles and lines to fill in: what the studies of long contexts and of FIM put before a model."""

import random
import re

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, from_config_dict
from dsv3_jax.training.tokenizer import train_tokenizer
from experiments.ablations import study
from experiments.ablations.extension import extended
from experiments.ablations.infill import _take_line, make_problems
from experiments.ablations.needles import WithNeedles, choose_words, hide, make_haystacks
from experiments.ablations.texts import pieces
from tests import micro_config

WORDS = [f" w{i}" for i in range(9)]


@pytest.fixture(scope="module")
def config():
    edited = micro_config.get_config()
    edited.model.vocab_size = 600
    edited.data.held_out = 0.2
    return from_config_dict(edited)


@pytest.fixture(scope="module")
def text(config, tmp_path_factory):
    return study.open_text(config, tmp_path_factory.mktemp("text"))


def test_pieces_end_at_lines_and_lose_nothing():
    document = "aa\nbbbb\nc\n" + "d" * 30 + "\ne"
    cut = pieces([document, "f"], 8)
    assert cut == ["aa\nbbbb\n", "c\n", "d" * 30 + "\n", "e", "f"]


def test_a_text_has_one_needle_that_repeats_after_some_of_its_lines_or_fills_it():
    lines = "x\n" * 200
    texts = WithNeedles([lines] * 30, WORDS)
    needles = [re.findall(r">>( w\d)\n", texts[i]) for i in range(30)]
    assert all(len(set(of_text)) == 1 for of_text in needles)
    assert len({of_text[0] for of_text in needles}) > 3
    rests = {re.sub(r">>.*\n", "", texts[i]) for i in range(30)}
    assert rests == {lines, ""}
    assert min(map(len, needles)) < 20 and max(map(len, needles)) > 60  # sparse and dense


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_haystack_ends_with_the_word_that_stands_at_that_depth(text, depth):
    words, length = choose_words(text.tokenizer), 120
    hay = np.arange(2 * length, dtype=np.int32) % 97 + 300
    row = hide(hay, length, depth, words, text.tokenizer, seed=3)
    mark_ids = text.tokenizer.encode(">>").ids
    assert len(row) == length and text.tokenizer.decode(row[-1:].tolist()) in words
    said = [i for i in range(length - 1) if row[i : i + len(mark_ids)].tolist() == mark_ids and row[i + len(mark_ids)] == row[-1]]
    assert len(said) == 2 and said[1] == length - len(mark_ids) - 1
    assert abs(said[0] - depth * length) < 12
    with pytest.raises(ConfigError, match=r"config\.train\.sequence_length = 3"):
        hide(hay, 3, depth, words, text.tokenizer, seed=3)


def test_haystacks_lie_by_depth_and_are_as_long_as_was_asked_for(text):
    words = choose_words(text.tokenizer)
    rows = make_haystacks(text, words, 3, 40, (0.0, 1.0), trials=2)
    assert rows.shape == (4, 120)
    mark = text.tokenizer.encode(">>").ids[0]
    first = [row.tolist().index(mark) for row in rows]
    assert max(first[:2]) < 5 and min(first[2:]) > 100
    with pytest.raises(ConfigError, match=r"--lengths = 1: for haystacks of 3 tokens needle and question have \d+ tokens; raise it"):
        make_haystacks(text, words, 1, 3, (0.0,), trials=1)
    with pytest.raises(ConfigError, match=r"--lengths = 4000: for haystacks of 160000 tokens the held-out text has \d+ tokens"):
        make_haystacks(text, words, 4000, 40, (0.0,), trials=1)


def test_a_vocabulary_without_words_is_refused():
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 261: only 0 words are one token"):
        choose_words(train_tokenizer(["x"], 261))


def test_a_line_is_taken_out_whole_and_lies_where_its_problem_says(text, config):
    assert _take_line("  ab = 1\n", random.Random(0)) == ("  ", "ab = 1", "\n")
    held_out = pieces(text.corpus.valid, 100)
    infix, after_prefix = make_problems(text, held_out, 64, most=20)
    assert len(infix.rows) == len(after_prefix.rows) == 20
    for n in range(20):
        middles = [problem.rows[n][problem.at[n][problem.counts[n]]] for problem in (infix, after_prefix)]
        assert np.array_equal(*middles) and len(middles[0]) == infix.ends[n] > 0
        assert infix.rows[n][infix.at[n][0] - 1] == text.vocabulary.fim_ids[2]
        assert infix.rows[n][infix.at[n][infix.ends[n]]] == text.vocabulary.eos_id
        prefix = text.tokenizer.decode(after_prefix.rows[n][: after_prefix.at[n][0]].tolist())
        middle = text.tokenizer.decode(middles[0].tolist())
        assert any(piece.startswith(prefix + middle) for piece in held_out)


def test_a_phase_keeps_the_tokens_of_a_step_at_the_last_learning_rate(config):
    config = study.changed(config, train={"batch_size": 8, "batch_size_start": 8, "micro_batch_size": 4}, data={"num_shards": 4})
    phase = extended(config, "yarn", 4, steps=20)
    assert (phase.train.sequence_length, phase.train.batch_size, phase.train.micro_batch_size) == (64, 2, 2)
    assert phase.model.rope_scaling.factor == 4.0 and phase.model.rope_scaling.original_max_position_embeddings == 16
    plans = [study.plan_step(tokens, phase) for tokens in (0, 19 * 128)]
    assert {plan.learning_rate for plan in plans} == {config.optimizer.final_lr} and plans[1].tokens == 20 * 128
    assert {plan.bias_update_speed for plan in plans} == {0.0}
    assert extended(config, "yarn", 32, steps=5).train.batch_size == 1
