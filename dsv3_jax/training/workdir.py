"""What a run keeps in its workdir, and whether a configuration may continue it."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config, ConfigError, from_dict, to_dict
from dsv3_jax.parallel.processes import is_main
from dsv3_jax.training.metrics import write_json

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.json"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINT_DIR = "checkpoints"

# A run that continues keeps these: with another value its checkpoint or its data would not fit.
_FIXED_SECTIONS = ("model", "data")
_FIXED_FIELDS = ("train.seed", "train.sequence_length", "train.compute_dtype", "train.balance", "train.ema_decay", "optimizer.moment_dtype")


def load_config(workdir: Path) -> Config:
    """The configuration a workdir was made with. Raises ConfigError when it holds no run."""
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError("--workdir", str(workdir), f"holds no {CONFIG_FILE}; give the workdir of a run of experiments.pretrain")
    return from_dict(json.loads(path.read_text()))


def check_continues(workdir: Path, config: Config) -> None:
    """Raises ConfigError when the workdir belongs to a run that this configuration cannot continue."""
    if not (workdir / CONFIG_FILE).exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise ConfigError("--workdir", str(workdir), "exists and is no run's folder; give an empty or a new one")
        return
    old, new = _fixed(load_config(workdir)), _fixed(config)
    for field, value in new.items():
        if value != old[field]:
            remedy = f"{workdir} holds a run with {old[field]!r}; give that value or another --workdir"
            raise ConfigError(f"config.{field}", value, remedy)


def make_folder(workdir: Path) -> None:
    """The folder that --workdir names, and those above it. Raises ConfigError where none can be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--workdir", str(workdir), f"no such folder can be made ({error.strerror}); name another") from error


@contextmanager
def new_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Creates the workdir and writes the configuration into it; an error of the user within takes both away again if they are new.

    The work of the main process, before others look at the workdir.
    """
    if not is_main():
        yield
        return
    is_new, made = not (workdir / CONFIG_FILE).exists(), not workdir.exists()
    make_folder(workdir)
    write_json(workdir / CONFIG_FILE, to_dict(config))
    try:
        yield
    except (ConfigError, SystemExit):  # SystemExit: another process found it
        if is_new:
            for name in (CONFIG_FILE, TOKENIZER_FILE):
                (workdir / name).unlink(missing_ok=True)
        if made:
            workdir.rmdir()
        raise


def _fixed(config: Config) -> dict[str, Any]:
    flat = _flatten(config)
    return {k: v for k, v in flat.items() if k.split(".")[0] in _FIXED_SECTIONS or k in _FIXED_FIELDS}


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), prefix + field.name
        out |= _flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return out
