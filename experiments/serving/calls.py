"""The body of a request, read strictly: a field that would change the answer is obeyed or refused, never passed over."""

import json
import reprlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError, nearest_name
from dsv3_jax.inference.chat import encode_chat
from experiments.serving.errors import ApiError
from experiments.serving.worker import Job

MAX_STOPS, MAX_STOP_LENGTH = 4, 1000
ROLES = ("system", "user", "assistant")
_BENIGN = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# What this server cannot do, and the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
_KNOWN = ("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream",
          "stream_options", *_UNSUPPORTED, *_BENIGN)  # fmt: skip


class Served(NamedTuple):
    """The model as requests see it."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    vocab_size: int
    context: int  # tokens of a prompt and its answer


class Call(NamedTuple):
    """A request: the job, and how the answer is to be sent."""

    job: Job
    stream: bool
    include_usage: bool


def read_call(text: bytes, chat: bool, served: Served) -> Call:
    """Reads a body. Raises ApiError for one that cannot be obeyed to the letter."""
    body = _Fields(_read_object(text))
    _check_model(body.take("model", str, None, "the name of a model"), served.name)
    prompt = _chat_prompt(body, served) if chat else _text_prompt(body, served)
    count = _tokens_to_generate(body, chat, len(prompt), served.context)
    seed = body.integer("seed", None, -(2**63), 2**63 - 1)
    job = Job(
        prompt, count, body.number("temperature", 1.0, 2.0), body.number("top_p", 1.0, 1.0),
        secrets.randbits(32) if seed is None else seed % 2**32, _stops(body),
    )  # fmt: skip
    stream, include_usage = _streaming(body)
    body.refuse_rest()
    return Call(job, stream, include_usage)


def _tokens_to_generate(body: "_Fields", chat: bool, prompt: int, context: int) -> int:
    limit = body.integer("max_tokens", None, 1, None)
    if chat:
        newer = body.integer("max_completion_tokens", None, 1, None)
        if None not in (limit, newer) and limit != newer:
            message = f"max_completion_tokens = {reprlib.repr(newer)}, max_tokens = {reprlib.repr(limit)}: give one of them"
            raise ApiError(400, message, "max_completion_tokens")
        limit = newer if limit is None else limit
    count = limit or (max(context - prompt, 1) if chat else 16)  # the API's own defaults
    if not 0 < prompt <= context - count:
        asked = f"a prompt of {prompt} tokens and {reprlib.repr(count)} new ones"
        message = f"{asked}: a prompt has at least one, and together they are at most {context}"
        raise ApiError(400, message, "messages" if chat else "prompt", "context_length_exceeded")
    return count


class _Fields:
    """The fields of an object, each taken once. A null is the same as nothing."""

    def __init__(self, values: dict[str, Any]):
        self._values = values

    def take(self, name: str, kind: type | tuple[type, ...], default: Any, what: str, fits: Callable[[Any], bool] = lambda _: True) -> Any:
        """A field's value; `what` says in an error what it has to be."""
        value = self._values.pop(name, None)
        if value is None:
            return default
        # In JSON true is no number, in Python it is one.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not fits(value):
            raise ApiError(400, f"{name} = {reprlib.repr(value)}: must be {what}", name)
        return value

    def number(self, name: str, default: float, high: float) -> float:
        """A number from 0 to `high`."""
        return float(self.take(name, (int, float), default, f"a number from 0 to {high:g}", lambda value: 0 <= value <= high))

    def integer(self, name: str, default: int | None, low: int, high: int | None) -> int | None:
        """A whole number from `low`."""
        what = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        return self.take(name, int, default, what, lambda value: low <= value and (high is None or value <= high))

    def refuse_rest(self) -> None:
        """Raises ApiError for what was not taken and could change the answer."""
        for name, value in self._values.items():
            if name in _UNSUPPORTED:
                neutral = any(type(value) is type(other) and value == other for other in (None, *_UNSUPPORTED[name]))
                if not neutral:
                    raise ApiError(400, f"{name} = {reprlib.repr(value)}: is not supported; leave it out", name)
            elif name in _KNOWN and name not in _BENIGN:
                raise ApiError(400, f"{name} = {reprlib.repr(value)}: is a field of the other endpoint, not of this one", name)
            elif name not in _BENIGN:
                raise ApiError(400, f"{name[:40]} = {reprlib.repr(value)}: unknown field, {nearest_name(name[:40], _KNOWN)}", name[:40])


def _read_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text, and could not be sent back
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _check_model(name: str | None, served: str) -> None:
    if name is None:
        raise ApiError(400, f"model is missing; this server has {served!r}", "model")
    if name != served:
        raise ApiError(404, f"model = {reprlib.repr(name)}: does not exist; this server has {served!r}", "model", "model_not_found")


def _text_prompt(body: _Fields, served: Served) -> list[int]:
    what = "a text, a list of token ids, or a list with one of these"
    prompt = body.take("prompt", (str, list), None, what)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return served.tokenizer.encode_batch_fast([prompt])[0].ids  # this one lets other threads run meanwhile
    if prompt is None or not all(type(token) is int and 0 <= token < served.vocab_size for token in prompt):
        raise ApiError(400, f"prompt = {reprlib.repr(prompt)}: must be {what}, ids below {served.vocab_size}", "prompt")
    return prompt


def _chat_prompt(body: _Fields, served: Served) -> list[int]:
    messages = body.take("messages", list, None, "a list of messages", bool)
    if messages is None:
        raise ApiError(400, "messages is missing", "messages")
    try:
        return encode_chat(served.folder, served.tokenizer, [_message(message) for message in messages])
    except ConfigError as error:
        raise ApiError(400, f"messages: {error.remedy}", "messages") from error


def _message(message: Any) -> dict[str, str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in content):
        parts = [part["text"] for part in content if part["type"] == "text" and isinstance(part["text"], str)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str) or message.get("role") not in ROLES:
        raise ApiError(400, f"messages: {reprlib.repr(message)}: needs a role ({', '.join(ROLES)}) and content, text only", "messages")
    if others := [name for name, value in message.items() if name not in ("role", "content") and value not in (None, [])]:
        raise ApiError(400, f"messages: {reprlib.repr(others[0])} of a message is not supported; leave it out", "messages")
    return {"role": message["role"], "content": content}


def _stops(body: _Fields) -> tuple[str, ...]:
    def fits(value: str | list) -> bool:
        stops = [value] if isinstance(value, str) else value
        return len(stops) <= MAX_STOPS and all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops)

    what = f"a text, or up to {MAX_STOPS} of them, each of 1 to {MAX_STOP_LENGTH} characters"
    stops = body.take("stop", (str, list), (), what, fits)
    return (stops,) if isinstance(stops, str) else tuple(stops)


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether a value is among true, false and null: 1 is none of them, though in Python it equals true."""
    return any(value is other for other in others)


def _streaming(body: _Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether to count tokens at its end."""
    stream = body.take("stream", bool, False, "true or false")
    what = "an object with include_usage"
    known = {"include_usage": (True, False, None), "include_obfuscation": (False, None)}
    options = body.take("stream_options", dict, {}, what, lambda value: all(_is_one_of(value[key], known.get(key, ())) for key in value))
    if options and not stream:
        raise ApiError(400, "stream_options is for stream = true", "stream_options")
    return stream, bool(options.get("include_usage"))
