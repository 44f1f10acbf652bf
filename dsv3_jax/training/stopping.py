"""SIGTERM and Ctrl-C as a flag, so that what runs can end in order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignal:
    """Whether SIGTERM or the first Ctrl-C has come."""

    received = False

    def __call__(self, number: int, frame: object) -> None:
        del frame
        self.received = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Turns SIGTERM and Ctrl-C into a flag to be read where it is fit to stop."""
    stop = StopSignal()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
