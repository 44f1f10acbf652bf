"""What commands print and write: tables, sizes, pictures, and paths that can be written to."""

import errno
import io
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import ConfigError
from dsv3_jax.files import draft_of, is_special


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Rows as text in columns; `align` has < or > for each. A rule follows the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def check_output(flag: str, name: str) -> None:
    """Raises ConfigError unless `name` can become a file, or can be written to as it is: for a command to call before it works."""
    folder = Path(name).parent
    try:
        if not folder.is_dir():
            raise ConfigError(flag, name, f"there is no folder {folder}; make it first")
        if Path(name).is_dir():
            raise ConfigError(flag, name, "is a folder; name a file")
        _try_to_write(Path(name))
    except OSError as error:
        raise ConfigError(flag, name, f"no such file can be made ({error.strerror}); name another") from error


def _try_to_write(path: Path) -> None:
    if is_special(path):  # it is written to and not replaced; opening it to find out could wait for a pipe's reader
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it cannot be written to")
        return
    with suppress(FileNotFoundError):
        os.stat(draft_of(path))  # the longer name, which is taken first, may be too long
    with tempfile.TemporaryFile(dir=path.parent):  # permissions do not tell: root has them all, in /proc and on a read-only disk
        pass


def check_outputs(*holders: flags.FlagHolder) -> None:
    """`check_output` for flags that name a file to write, those that are set."""
    for holder in holders:
        if holder.value:
            check_output(f"--{holder.name}", holder.value)


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB below one of them."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def rendered(figure: Any, ending: str) -> bytes:
    """A matplotlib Figure as the bytes of a .png or .svg file."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if ending == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "dsv3_jax", "svg.fonttype": "none"}):  # the same picture is the same file
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return buffer.getvalue()


def panels(title: str, count: int = 1, across: bool = False) -> tuple[Any, list[Any]]:
    """An empty matplotlib Figure with `count` panels below each other, or beside each other, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6) if across else (8, 3.4 * count), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes = list(figure.subplots(*((1, count) if across else (count, 1)), squeeze=False).ravel())
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
