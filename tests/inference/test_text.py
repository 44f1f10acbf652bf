"""Pieces of text: whole characters only, together the whole text, cut at stop strings."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax.inference.text import StoppedText, TextStream
from dsv3_jax.training.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["naïve 漢字 🙂 def f(x): return [x, 1024];\n"] * 3, 270)


def pieces_of(ids):
    stream = TextStream(TOKENIZER)
    return [*map(stream.push, ids), stream.flush()]


def test_characters_of_several_tokens_come_whole():
    text = "漢字 🙂 naïve"
    ids = TOKENIZER.encode(text).ids
    assert len(ids) > len(text)  # some characters are cut
    pieces = pieces_of(ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 269), max_size=40))
@example([TOKENIZER.token_to_id(token) for token in ("ð", "Ł", "a")])  # a character that never gets its last bytes
@settings(max_examples=60, deadline=None)
def test_pieces_of_any_tokens_are_the_whole_text(ids):
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "cd", "ef"], [], ["ab", "cd", "ef", ""]),
        (["ab", "cd", "ef"], ["cde"], ["ab", "", ""]),  # "cd" is held until "e" decides
        (["ab", "cd", "xf"], ["cde"], ["ab", "", "cdxf", ""]),
        (["ab", "cd"], ["cde"], ["ab", "", "cd"]),  # nothing follows
        (["aab"], ["ab"], ["a"]),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", ""]),
        (["xyz"], ["z", "y"], ["x"]),
    ],
)
def test_stop_strings(pieces, stops, shown):
    text, said = StoppedText(stops), []
    for piece in pieces:
        said.append(text.push(piece))
        if text.stopped:
            break
    else:
        said.append(text.flush())
    assert said == shown
