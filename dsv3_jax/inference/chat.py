"""A conversation as the prompt that a model was trained on: the chat template of its tokenizer (Jinja)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError
from dsv3_jax.json_object import read_object


def encode_chat(folder: Path, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of the prompt for the assistant's next turn. Raises ConfigError as `render_chat`."""
    # The template spells out the control tokens, the first one included.
    return tokenizer.encode_batch_fast([render_chat(folder, messages)], add_special_tokens=False)[0].ids


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
