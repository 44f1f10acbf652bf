"""How a file of results is written: whole or not at all, and what is no regular file stays what it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def is_special(path: Path) -> bool:
    """Whether a device, a pipe or a link has this name: a file that took the name would take its place."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def draft_of(path: Path) -> Path:
    """Where `replacing` writes what is to become `path`."""
    return path.with_name(f"{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens what takes the name `path` when the block ends well, so that a reader or a kill never meets half of it.

    What is special is written to directly.
    """
    if is_special(path):
        with path.open("wb") as file:
            yield file
        return
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            yield file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
