"""Answers in the JSON shapes of OpenAI's completions and chat completions, whole and in chunks."""

import time
import uuid
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """The fields that all parts of an answer share."""

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str) -> "Answer":
        """One with an id of its own."""
        return cls(chat, model, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {**self._head("chat.completion"), "choices": [_choice(said, finish)], "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text} if self.chat else {"text": text}, None)

    def ending(self, finish: str) -> dict[str, Any]:
        """The chunk that says why there is no more text."""
        return self._chunk({} if self.chat else {"text": ""}, finish)

    def counted(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, for `stream_options.include_usage`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _chunk(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [_choice({"delta": said} if self.chat else said, finish)]}

    def _head(self, of_chats: str) -> dict[str, Any]:
        return {"id": self.id, "object": of_chats if self.chat else "text_completion", "created": self.created, "model": self.model}


def usage(prompt: int, generated: int) -> dict[str, int]:
    """Counts of tokens; an end token, and those that a stop string cut off, were generated too."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _choice(said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish}
