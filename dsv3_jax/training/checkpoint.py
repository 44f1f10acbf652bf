"""Checkpoints through orbax: asynchronous, atomic, and checked before they are trusted.

A checkpoint holds four items: `model` (parameters and router bias), `optimizer` (moments and counters),
`ema` when there is one, and `run` (JSON: tokens seen, position in the data). orbax commits a checkpoint
by renaming it, so a killed run leaves none that is half there. Once one is committed its files' CRC-32
are noted beside it; on restart a checkpoint that fails them is moved aside and the one before it is used.

Of several processes each writes and reads its part; the main one checks, notes and moves, while the others wait.
"""

import json
import logging
import shutil
import threading
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.config import ConfigError
from dsv3_jax.model.transformer import RouterBias
from dsv3_jax.parallel import processes
from dsv3_jax.training.metrics import write_json
from dsv3_jax.training.state import TrainState

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint, read back."""

    state: TrainState
    ema: PyTree | None
    run: dict[str, Any]


class Checkpointer:
    """Saves and restores the checkpoints of one run; `directory` holds one folder a step."""

    def __init__(self, directory: Path, keep: int):
        self._directory = directory.absolute()
        self._digests = self._directory / "digests"
        self._keep = keep
        self._sealer: threading.Thread | None = None
        with processes.main_first():
            if processes.is_main():
                self._digests.mkdir(parents=True, exist_ok=True)
                self._set_aside_damaged()
        self._manager = self._open()
        self._refuse_if_all_damaged()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._directory, options=options)

    def _set_aside_damaged(self) -> None:
        sound = newest_sound_step(self._directory)
        for step in saved_steps(self._directory):
            if sound is None or step > sound:
                self._set_aside(step, f"differs from what was written: {', '.join(damaged_files(self._directory, step)[:3])}")

    def _set_aside(self, step: int, reason: str) -> None:
        target = self._directory / "damaged" / str(step)
        _log.error("checkpoint %s is damaged (%s); moved to %s, the one before it is used", self._directory / str(step), reason, target)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (self._directory / str(step)).rename(target)

    def _refuse_if_all_damaged(self) -> None:
        moved = self._directory / "damaged"
        with processes.agreed():
            if not moved.exists() or self._manager.latest_step() is not None:
                return
            raise ConfigError("--workdir", str(self._directory.parent), f"none of its checkpoints can be read, they are in {moved}; "
                              "put one back, or start again in a new --workdir")  # fmt: skip

    def restore(self, abstract: TrainState, ema_like: PyTree | None) -> Restored | None:
        """The newest checkpoint that can be read, placed as `abstract` says; None when there is none yet.

        Raises ConfigError when there are checkpoints and none can be read.
        """
        while (step := self._manager.latest_step()) is not None:
            read, failure = None, None
            try:
                read = self._read(step, abstract, ema_like)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file; it is reported, never hidden
                failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            failures = processes.exchange(failure)
            if not failures:
                return read
            self._manager.close()
            with processes.main_first():
                if processes.is_main():
                    self._set_aside(step, failures[min(failures)])
            self._manager = self._open()
            self._refuse_if_all_damaged()
        return None

    def _read(self, step: int, abstract: TrainState, ema_like: PyTree | None) -> Restored:
        model, optimizer = _split(abstract)
        items: dict[str, Any] = {"model": ocp.args.StandardRestore(model), "optimizer": ocp.args.StandardRestore(optimizer)}
        if ema_like is not None:
            items["ema"] = ocp.args.StandardRestore(ema_like)
        read = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **items))
        state = _join(read.model, read.optimizer)
        state = state._replace(router_bias=_with_empty(state.router_bias, abstract.router_bias))
        return Restored(state, read.ema if ema_like is not None else None, read.run)

    def save(self, step: int, state: TrainState, ema: PyTree | None, run: dict[str, Any]) -> None:
        """Starts saving; the state may be donated once this returns. A step that is saved already is left as it is."""
        self._finish()
        if step in self._manager.all_steps():
            return
        model, optimizer = _split(state)
        items = {"model": ocp.args.StandardSave(model), "optimizer": ocp.args.StandardSave(optimizer)}
        if ema is not None:
            items["ema"] = ocp.args.StandardSave(ema)
        self._manager.save(step, args=ocp.args.Composite(run=ocp.args.JsonSave(run), **items), force=True)
        self._sealer = threading.Thread(target=self._seal, args=(step,), name="seal checkpoint")
        self._sealer.start()

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        if not processes.is_main():
            return
        write_json(self._digests / f"{step}.json", file_digests(self._directory / str(step)))
        for old in self._digests.glob("*.json"):
            if not (self._directory / old.stem).exists():
                old.unlink()

    def _finish(self) -> None:
        if self._sealer is not None:
            self._sealer.join()

    def close(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self._finish()
        self._manager.close()


def saved_steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def file_digests(folder: Path) -> dict[str, int]:
    """CRC-32 of every file below the folder, by relative path."""
    return {str(p.relative_to(folder)): _crc32(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def damaged_files(directory: Path, step: int) -> list[str]:
    """Files of a checkpoint that are missing or changed since it was written; empty when it was killed before digests were noted."""
    noted = directory / "digests" / f"{step}.json"
    if not noted.exists():
        return []
    digests, folder = json.loads(noted.read_text()), directory / str(step)
    return [name for name, crc in digests.items() if not (folder / name).is_file() or _crc32(folder / name) != crc]


def newest_sound_step(directory: Path) -> int | None:
    """The newest checkpoint whose files are as they were written; None when there is none."""
    return next((step for step in reversed(saved_steps(directory)) if not damaged_files(directory, step)), None)


def restore_model(directory: Path, step: int, abstract: PyTree, ema: bool) -> tuple[PyTree, PyTree]:
    """Parameters (or their moving average) and router bias of a checkpoint; `abstract` is (params, router_bias)."""
    params, bias = abstract
    items = {"model": ocp.args.StandardRestore({"params": params, "router_bias": _without_empty(bias)})}
    if ema:
        items["ema"] = ocp.args.StandardRestore(params)
    with ocp.CheckpointManager(directory.absolute()) as manager:
        read = manager.restore(step, args=ocp.args.Composite(**items))
    return read.ema if ema else read.model["params"], _with_empty(read.model["router_bias"], bias)


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"params": state.params, "router_bias": _without_empty(state.router_bias)}
    return model, {"opt_state": state.opt_state, "step": state.step, "skipped_in_a_row": state.skipped_in_a_row}


def _without_empty(bias: RouterBias) -> RouterBias:
    """The bias with None for the array of no layer (a model without MTP, or without MoE layers): orbax stores no empty arrays."""
    return jax.tree.map(lambda array: array if array.size else None, bias)


def _with_empty(stored: RouterBias, abstract: RouterBias) -> RouterBias:
    return RouterBias(
        *(jnp.zeros(like.shape, like.dtype) if array is None else array for array, like in zip(stored, abstract, strict=True))
    )


def _join(model: dict[str, Any], optimizer: dict[str, Any]) -> TrainState:
    return TrainState(optimizer["step"], model["params"], optimizer["opt_state"], model["router_bias"], optimizer["skipped_in_a_row"])


def abstract_like(tree: PyTree, sharding: jax.sharding.Sharding | PyTree[jax.sharding.Sharding]) -> PyTree:
    """Shapes, dtypes and placement of a pytree of arrays or shapes, for `restore`; one sharding, or a tree of them."""
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, jax.sharding.Sharding) else sharding
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
