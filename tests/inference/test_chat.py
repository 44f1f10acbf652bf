"""A conversation as a prompt: control tokens are the template's, whatever messages say."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.chat import encode_chat, render_chat
from dsv3_jax.training.tokenizer import train_tokenizer

# As DeepSeek's: contents stand between control tokens, and not all of these are marked special.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + CONTENT }}"
    "{% else %}{{ '<｜Assistant｜>' + CONTENT + bos_token }}{% endif %}{% endfor %}{{ '<｜Assistant｜>' }}"
)
ADDED = [AddedToken(text, normalized=False) for text in ("<｜User｜>", "<｜Assistant｜>", "</think>", "    ")]


@pytest.fixture(scope="module")
def tokenizer():
    """As a file of it is read: what training sets for texts to train on is not in the file."""
    tokenizer = Tokenizer.from_str(train_tokenizer([Path(__file__).read_text(encoding="utf-8") * 2], 400).to_str())
    tokenizer.add_tokens(ADDED)
    return tokenizer


def with_template(folder, content="m.content", template=TEMPLATE):
    settings = {"bos_token": "<|eos|>", "chat_template": template.replace("CONTENT", f"({content})")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def said(*contents):
    """The user speaks first."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def as_text(tokenizer, text):
    """Ids of a text to a tokenizer that knows no control token; runs of blanks stay tokens."""
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"].isspace()]
    plain = Tokenizer.from_str(json.dumps(parts))
    tokens = plain.encode(text, add_special_tokens=False).tokens
    return [tokenizer.token_to_id(token) for token in tokens]


def expected(tokenizer, *contents):
    """Ids of `TEMPLATE`, piece by piece."""
    first, user, assistant = (tokenizer.token_to_id(token) for token in ("<|eos|>", "<｜User｜>", "<｜Assistant｜>"))
    ids = [first]
    for i, content in enumerate(contents):
        ids += [assistant, *as_text(tokenizer, content), first] if i % 2 else [user, *as_text(tokenizer, content)]
    return [*ids, assistant]


def test_without_control_tokens_in_messages_a_prompt_is_the_rendered_text(tokenizer, tmp_path):
    messages = said("def read(path):\n    return <｜ 'User' ｜>", "no", " \ue000 why? ")
    ids = encode_chat(with_template(tmp_path), tokenizer, messages)
    assert ids == tokenizer.encode(render_chat(tmp_path, messages), add_special_tokens=False).ids
    assert ids == expected(tokenizer, *(message["content"] for message in messages))


@pytest.mark.parametrize(
    "spelt", ["<|eos|>", "<｜User｜>", "a<｜Assistant｜> b", "<|eos|><|eos|>    <|eo", "\ue000<|eos|>\ue001\ue002</think>"]
)
def test_control_tokens_in_messages_are_text(tokenizer, tmp_path, spelt):
    contents = "what is <|", f"this: {spelt}", spelt, "it"
    ids = encode_chat(with_template(tmp_path), tokenizer, said(*contents))
    assert ids == expected(tokenizer, *contents)
    assert tokenizer.decode(ids, skip_special_tokens=False) == render_chat(tmp_path, said(*contents))
    assert ids != tokenizer.encode(render_chat(tmp_path, said(*contents)), add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("content", "given", "passed"),
    [
        ("m.content | trim", " <|eos|> x ", "<|eos|> x"),
        ("m.content.split('</think>')[-1]", "hm <｜User｜></think>so<|eos|>", "so<|eos|>"),
        ("m.content.split('</think>')[0]", "<|eos|></think>so", "<|eos|>"),
        ("m.content | replace('<|eos|>', '')", "so</think><|eos|>", "so</think>"),
        ("m.content | replace('<|eos|>', '<eos>')", "so<|eos|>", "so<eos>"),
    ],
)
def test_a_template_may_cut_messages(tokenizer, tmp_path, content, given, passed):
    assert encode_chat(with_template(tmp_path, content), tokenizer, said(given, given)) == expected(tokenizer, passed, passed)


@pytest.mark.parametrize("content", ["m.content | length | string", "m.content[:4]", "m.content[-4:]", "m.content | urlencode"])
def test_a_template_that_does_not_pass_control_tokens_on_is_refused(tokenizer, tmp_path, content):
    with_template(tmp_path, content)
    assert encode_chat(tmp_path, tokenizer, said("hello there"))
    with pytest.raises(ConfigError, match=r"^--chat = .*: the chat template changes messages that spell a control token; .*out$"):
        encode_chat(tmp_path, tokenizer, said("<|eos|> hello <|eos|>"))


def test_messages_that_hold_every_mark_are_refused(tokenizer, tmp_path):
    every = "".join(map(chr, range(0xE000, 0xF900)))
    assert encode_chat(with_template(tmp_path), tokenizer, said(every)) == expected(tokenizer, every)
    assert encode_chat(tmp_path, tokenizer, said(f"{every[:-2]}<|eos|>")) == expected(tokenizer, f"{every[:-2]}<|eos|>")
    with pytest.raises(ConfigError, match="all characters for private use"):
        encode_chat(tmp_path, tokenizer, said(f"{every[:-1]}<|eos|>"))


def test_a_control_token_that_appears_only_when_text_is_normalized_is_text(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "?": 1, "<b>": 2}, unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Split("x", "isolated")
    tokenizer.add_tokens([AddedToken("<a>", normalized=True)])
    with_template(tmp_path, template="<a>{{ messages[0].content }}")
    assert encode_chat(tmp_path, tokenizer, said("x")) == [3, 0]
    assert encode_chat(tmp_path, tokenizer, said("x＜a＞")) == [3, 0, 1]


def test_a_tokenizer_that_makes_control_tokens_of_text_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "?": 1, "<a>": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<a>"])
    with_template(tmp_path, template="<a> {{ messages[0].content }}")
    assert encode_chat(tmp_path, tokenizer, said("x")) == [2, 0]
    with pytest.raises(ConfigError, match="this tokenizer makes a control token of plain text"):
        encode_chat(tmp_path, tokenizer, said("x <a>"))
