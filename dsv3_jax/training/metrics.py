"""What a run reports while it trains: `metrics.jsonl`, `expert_load.jsonl` and TensorBoard events.

The JSON lines are the record of the run. Each line reaches the operating system before `write` returns, so
a killed process loses nothing that it reported; a resumed run first drops the lines after its checkpoint,
so the files read as if the run had never stopped. Losses and other figures that are not finite are written
as null, because NaN and Infinity are not JSON.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Num
from tensorboardX import SummaryWriter

from dsv3_jax.config import ConfigError
from dsv3_jax.files import replacing

METRICS_FILE = "metrics.jsonl"
LOAD_FILE = "expert_load.jsonl"
TENSORBOARD_DIR = "tensorboard"


def max_vio(load: Num[Array | np.ndarray, "*l e"]) -> Float[Array | np.ndarray, "*l"]:
    """MaxVio = max_i load_i / mean load - 1 of each layer (2408.15664, sec. 4.1): 0 is perfect balance, E - 1 the worst.

    Any unit of load will do (counts, fractions). A layer without any load gives NaN.
    """
    return load.max(axis=-1) / load.mean(axis=-1) - 1


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replaces the file in one move; a device, a pipe or a link is written to instead."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; numbers that are not finite become null. Raises TypeError for what JSON cannot hold."""
    write_atomically(path, json.dumps(_to_json(value), indent=2, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] if it does not exist yet.

    A last line cut short by a kill is left out. Any other unreadable line raises `ConfigError` with its number.
    """
    return [row for _, row in _rows(path)]


class MetricsWriter:
    """Appends the metrics of each step to the files of a workdir, from `resume_step` on.

    `resume_step` is the step of the checkpoint that training continues from (0: a new run); lines after it
    are dropped, from both files or, if one of them is damaged (`ConfigError`), from neither.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        workdir.mkdir(parents=True, exist_ok=True)
        paths = [workdir / METRICS_FILE, workdir / LOAD_FILE]
        for path, text in [(path, _text_until(path, resume_step)) for path in paths]:  # reads all before it writes any
            write_atomically(path, text)
        self._metrics, self._load = (path.open("a") for path in paths)
        # The suffix keeps runs that start within one second apart: the name holds whole seconds only.
        self._tensorboard = SummaryWriter(
            str(workdir / TENSORBOARD_DIR), purge_step=resume_step + 1, flush_secs=10, filename_suffix=f".{resume_step}"
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one step: `step` (from 1) and its scalars, as Python, NumPy or JAX numbers."""
        plain = _to_json(row)
        _append(self._metrics, plain)
        for name, value in plain.items():
            self._scalar(_tag(name), value, plain["step"])

    def write_load(self, step: int, load: Float[np.ndarray, "l e"], layers: Sequence[str]) -> None:
        """Appends the share of all assignments that went to each expert, a row for each of `layers` (rows sum to 1)."""
        if len(load) != len(layers):
            raise ValueError(f"load has {len(load)} rows for {len(layers)} layers")
        _append(self._load, {"step": step, "load": _to_json(np.round(load.astype(np.float64), 6)), "layers": list(layers)})
        for layer, violation in zip(layers, max_vio(load), strict=True):
            self._scalar(f"max_vio/{layer.replace(' ', '_')}", float(violation), step)

    def close(self) -> None:
        self._metrics.close()
        self._load.close()
        self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _scalar(self, tag: str, value: float | int | None, step: int) -> None:
        if value is not None and math.isfinite(value):
            self._tensorboard.add_scalar(tag, value, step)


def _tag(name: str) -> str:
    return f"validation/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def _append(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def _to_json(value: Any) -> Any:
    """Arrays become lists, array scalars Python numbers, numbers that are not finite None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text_until(path: Path, step: int) -> bytes:
    """The lines with a step <= `step`, byte for byte."""
    return b"".join(line + b"\n" for line, row in _rows(path) if row["step"] <= step)


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line beside the object it holds; only what follows the last line break may be incomplete."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = [(line, _parse(line)) for line in lines]
    for number, (line, row) in enumerate(rows, start=1):
        if row is None:
            text = line[:60].decode(errors="replace")
            raise ConfigError(f"{path}:{number}", text, "is not a JSON object with an integer step; repair or delete that line")
    return [(line, row) for line, row in [*rows, (last, _parse(last))] if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of one line, None if the line is no JSON object with an integer `step`."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
