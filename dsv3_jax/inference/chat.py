"""A conversation as the prompt that a model was trained on: the chat template of its tokenizer (Jinja)."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError
from dsv3_jax.json_object import read_object

_PRIVATE_USE = frozenset(map(chr, range(0xE000, 0xF900)))  # characters that no control token has


def encode_chat(folder: Path, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of the prompt for the assistant's next turn. Control tokens come from the template alone: in a message they are text.

    Raises ConfigError as `render_chat`, and where a control token in a message cannot be told from the template's own.
    """
    rendered, control = render_chat(folder, messages), _control_tokens(tokenizer)
    texts = [text for message in messages for text in message.values()]
    if all(set(control.values()).isdisjoint(_encode(tokenizer, text)) for text in texts):
        return _encode(tokenizer, rendered)
    opening, closing, *_ = [*sorted(_PRIVATE_USE.difference(rendered, *texts)), None, None]
    if closing is None:
        raise ConfigError("--chat", str(folder), "messages hold all characters for private use beside a control token; leave some out")
    text = _marked(folder, messages, rendered, control, opening, closing)
    names = {token: f"{opening}{i}{closing}" for token, i in control.items()}
    # A template may cut a message at a control token, as at </think>, and leave one mark alone.
    parts = f"{opening}({_any(control)}){closing}|({_any(control)})|[{opening}{closing}]"
    return _encode_renamed(folder, tokenizer, re.sub(parts, lambda found: found[1] or names.get(found[2], ""), text), names)


def _control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    # Whether one is marked special says little: DeepSeek's <｜User｜> is not. Blanks are added to some tokenizers as plain text.
    return {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if not token.content.isspace()}


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # The template spells out the control tokens, the first one included.
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _any(tokens: Iterable[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))  # as the tokenizer, the longest first


def _marked(folder: Path, messages: Sequence[dict[str, str]], rendered: str, control: Iterable[str], opening: str, closing: str) -> str:
    """The rendered prompt with marks around each control token that comes from a message."""
    marks = rf"{opening}\g<0>{closing}"
    marked = render_chat(folder, [{key: re.sub(_any(control), marks, text) for key, text in message.items()} for message in messages])
    if re.sub(f"[{opening}{closing}]", "", marked) != rendered:
        raise ConfigError("--chat", str(folder), "the chat template changes messages that spell a control token; leave the token out")
    return marked


def _encode_renamed(folder: Path, tokenizer: Tokenizer, text: str, names: dict[str, str]) -> list[int]:
    """Ids of a text in which control tokens have other names, and only these: what else it says merges as it does in any text."""
    renamed = _renamed(tokenizer, tuple(names.items()))
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    own = {renamed.token_to_id(names.get(token, token)): i for token, i in added.items()}
    ids = _encode(renamed, text)
    if any(i not in own and i in added.values() for i in ids):
        raise ConfigError("--chat", str(folder), "this tokenizer makes a control token of plain text; leave the token out of messages")
    return [own.get(i, i) for i in ids]


@functools.lru_cache(maxsize=2)  # one of 128K tokens takes a while to make
def _renamed(tokenizer: Tokenizer, names: tuple[tuple[str, str], ...]) -> Tokenizer:
    """The tokenizer with other names for some of its added tokens, whose ids may change."""
    parts, new = json.loads(tokenizer.to_str()), dict(names)
    for token in parts["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    return Tokenizer.from_str(json.dumps(parts))


def render_chat(folder: Path, messages: Sequence[dict[str, str]]) -> str:
    """The prompt for the assistant's next turn; control tokens are spelt out in it.

    Reads chat_template.jinja, or `chat_template` of tokenizer_config.json. Raises ConfigError where there is none or it fails.
    """
    settings = _tokenizer_config(folder)
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if not isinstance(template, str):
        raise ConfigError("--chat", str(folder), "there is no chat template beside the tokenizer; give plain text to continue")
    # A template comes with the weights, from anywhere: it runs without access to Python's objects.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    tokens = {name: _text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        return environment.from_string(template).render(messages=list(messages), add_generation_prompt=True, **tokens)
    except Exception as error:  # a template is a program and can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("--chat", str(folder), f"the chat template fails: {type(error).__name__}: {reason}") from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        raise ConfigError("--chat", str(path), str(error)) from error


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
