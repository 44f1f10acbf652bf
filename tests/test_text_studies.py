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
from experiments.ablations.needles import OTHERS, WithNeedles, Words, choose_words, hide
from experiments.ablations.texts import pieces
from tests import micro_config

WORDS = Words([f" k{i}" for i in range(9)], [f" v{i}" for i in range(9)])


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


def test_a_key_keeps_its_value_within_a_text_and_most_needles_repeat_one():
    lines = "x\n" * 300
    texts = WithNeedles([lines] * 20, WORDS)
    for made in map(texts.__getitem__, range(20)):
        needles = re.findall(r">>( k\d)( v\d)\n", made)
        assert len(set(needles)) == len({key for key, _ in needles}) <= len(WORDS.keys)
        assert re.sub(r">>.*\n", "", made) in (lines, "")
    assert 0 < sum("x" in texts[i] for i in range(20)) < 20


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_haystack_ends_with_the_value_that_its_key_was_given_at_that_depth(text, depth):
    words, length = choose_words(text.tokenizer), 120
    hay = np.frombuffer(random.Random(0).randbytes(2 * length), np.int16) % 97 + 300
    row = hide(hay, length, depth, words, text.tokenizer, seed=3)
    said = text.tokenizer.decode(row.tolist())
    key, value = said.rsplit("\n>>", 1)[1].rsplit(" ", 1)
    assert len(row) == length and f" {value}" in words.values and key in words.keys
    assert len(re.findall(r">> \w+ \w+\n", said)) == OTHERS + 1 and said.count(f">>{key} {value}\n") == 1
    before = text.tokenizer.encode(said[: said.index(f"\n>>{key} {value}\n")]).ids
    assert depth * 0.6 - 0.05 <= len(before) / length <= depth * 0.8 + 0.25  # other needles may stand before it too
    with pytest.raises(ConfigError, match=r"config\.train\.sequence_length = 9"):
        hide(hay, 9, depth, words, text.tokenizer, seed=3)


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
