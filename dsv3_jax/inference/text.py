"""Text of tokens that come one by one: in pieces that never cut a character, up to a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"  # decoders put it where bytes are no character, or not yet


class TextStream:
    """The text of a growing list of tokens, in pieces; together they are the text of all of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Some decoders join a token to the one before it, so the tokens of the last piece stay as context.
        self._ids: list[int] = []
        self._context = 0  # of them, those whose text is out
        self._shown = ""

    def push(self, token: int) -> str:
        """What can be shown now: nothing while a character's bytes are not all there."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith(INCOMPLETE) else self._take(text)

    def flush(self) -> str:
        """What is left when no token follows."""
        return self._take(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def _take(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._ids = self._ids[self._context :]
        self._context, self._shown = len(self._ids), self._decode()
        return piece


class StoppedText:
    """Text in pieces up to the first of some strings, which is left out; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What can be shown now."""
        text, self._held = self._held + piece, ""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is left when no piece follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
