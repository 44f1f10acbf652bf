"""A converted checkpoint: our stacked parameters on disk, to be read by any number of hosts, each its own part.

    CKPT/weights.json       architecture, dtype and shape of every array; written last
    CKPT/arrays/PATH        a zarr array a parameter, through tensorstore; one public tensor is one chunk or more
    CKPT/config.json ...    what the public folder had beside its weights, tokenizer included

While it is being made the folder is called CKPT.partial and keeps a journal of the tensors that are done: the
same command goes on from there. Only a whole checkpoint gets its name.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from tqdm import tqdm

from dsv3_jax.config import ConfigError, ModelConfig, default_config, from_dict, to_dict
from dsv3_jax.interop.huggingface import PUBLIC_CONFIG, PublicCheckpoint, open_public
from dsv3_jax.interop.layout import Piece, piece_index, scale_path, scale_shape, stored_shapes
from dsv3_jax.interop.safetensors import CheckpointError
from dsv3_jax.interop.weights import FP8, Index, kept_dtype, read_as

MANIFEST = "weights.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
_CHUNK_BYTES = 2**26


class Store:
    """A converted checkpoint, opened; a `WeightSource`. Raises CheckpointError for a folder that is none or is not whole."""

    def __init__(self, folder: Path):
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(MANIFEST, "is missing: this is no converted checkpoint, or one whose conversion was not finished", folder)
        try:
            manifest = json.loads(path.read_text())
            self.config = _model_config(manifest["model"])
            self.arrays: dict[str, dict[str, Any]] = manifest["arrays"]
            self.copies: dict[str, str] = manifest["copies"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(MANIFEST, f"cannot be read: {type(error).__name__} {error}", folder) from error
        self.folder = folder
        self._open: dict[str, ts.TensorStore] = {}
        self._check()

    def stored_dtype(self, path: str) -> np.dtype:
        return ts.dtype(self.arrays[path]["dtype"]).numpy_dtype

    def read(self, path: str, index: Index) -> np.ndarray:
        try:
            return self._array(path)[index].read().result()
        except ValueError as error:
            raise CheckpointError(path, f"cannot be read: {str(error).splitlines()[0][:200]}", self.folder) from error

    def read_scale(self, path: str, index: Index) -> np.ndarray:
        return self.read(scale_path(path), index)

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            # Chunks are never absent in a whole checkpoint: a lost file must not read as zeros.
            spec = _spec(self.folder, path) | {"fill_missing_data_reads": False}
            self._open[path] = ts.open(spec, open=True, read=True).result()
        return self._open[path]

    def _check(self) -> None:
        for path, shape in stored_shapes(self.config).items():
            if path not in self.arrays or tuple(self.arrays[path]["shape"]) != shape:
                raise CheckpointError(path, f"is not in {MANIFEST} with shape {shape}", self.folder)
            if not (self.folder / "arrays" / _file_name(path)).is_dir():
                raise CheckpointError(path, "has no array", self.folder)


def open_weights(folder: Path) -> Store | PublicCheckpoint:
    """Opens a converted checkpoint or a public folder. Raises CheckpointError or ConfigError."""
    if not folder.is_dir():
        raise CheckpointError("checkpoint", "is no folder", folder)
    if (folder / MANIFEST).is_file() or (folder / "arrays").exists():
        return Store(folder)
    return open_public(folder)


def convert(public: PublicCheckpoint, source: Path, target: Path, dtype: str) -> None:
    """Writes a public checkpoint as a converted one, a tensor at a time; `dtype`: source (as stored, FP8 included), float32, bfloat16.

    Goes on from an interrupted call with the same arguments. Raises ConfigError when `target` exists.
    """
    with unfinished(target, {"source": str(source.resolve()), "dtype": dtype, "files": _identity(source)}) as draft:
        arrays = _plan(public, dtype)
        journal = draft / "done.txt"
        done = set(journal.read_text().splitlines()) if journal.exists() else set()
        stores = {path: _create(draft, path, array, public) for path, array in arrays.items()}
        pieces = [piece for stack in public.pieces.values() for piece in stack.values()]
        with journal.open("a") as log:
            for piece in tqdm(pieces, "Converting", unit="tensor", disable=None):
                if piece.tensor not in done:
                    _convert_piece(public, piece, stores)
                    log.write(piece.tensor + "\n")
                    log.flush()
        copy_tokenizer(source, draft)
        shutil.copyfile(source / PUBLIC_CONFIG, draft / PUBLIC_CONFIG)
        manifest = {"model": to_dict(public.config), "arrays": arrays, "copies": public.copies}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))


@contextmanager
def unfinished(target: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder TARGET.partial, renamed to `target` once the block ends well; kept for the next call when it does not.

    `identity` says what is being written: a rest of something else is refused, not mixed in.
    """
    if target.exists():
        raise ConfigError("target", str(target), "exists; give a new folder or remove it")
    draft, note, text = target.with_name(target.name + ".partial"), "writing.json", json.dumps(identity)
    if draft.exists() and any(draft.iterdir()) and (not (draft / note).is_file() or (draft / note).read_text() != text):
        raise ConfigError("target", str(target), f"{draft} is left over from another conversion; remove it")
    draft.mkdir(parents=True, exist_ok=True)
    if not (draft / note).exists():
        (draft / note).write_text(text)
    yield draft
    draft.rename(target)  # before the notes go: killed in between, the target is whole and has two files too many
    for name in (note, "done.txt"):
        (target / name).unlink(missing_ok=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files that are there."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _identity(source: Path) -> list[list[Any]]:
    files = sorted(p for p in source.iterdir() if p.suffix in (".json", ".safetensors"))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _plan(public: PublicCheckpoint, dtype: str) -> dict[str, dict[str, Any]]:
    """Dtype and shape of every array to write."""
    arrays: dict[str, dict[str, Any]] = {}
    for path, shape in stored_shapes(public.config).items():
        kept = kept_dtype(public, path, dtype)
        arrays[path] = {"dtype": ts.dtype(kept).name, "shape": list(shape)}
        if kept == FP8:
            piece = next(iter(public.pieces[path].values()))
            arrays[scale_path(path)] = {"dtype": "float32", "shape": list(scale_shape(piece, shape))}
    return arrays


def _create(folder: Path, path: str, array: dict[str, Any], public: PublicCheckpoint) -> ts.TensorStore:
    first = next(iter(public.pieces[path.removesuffix("/scale_inv")].values()))
    chunk = [1 if axis < len(first.where) and isinstance(first.where[axis], int) else n for axis, n in enumerate(array["shape"])]
    row_bytes = ts.dtype(array["dtype"]).numpy_dtype.itemsize * int(np.prod(chunk[1:]))
    if not first.where:  # embedding and head
        chunk[0] = max(1, min(chunk[0], _CHUNK_BYTES // max(1, row_bytes)))
    layout = ts.ChunkLayout(chunk_shape=[max(1, n) for n in chunk])
    return ts.open(
        _spec(folder, path), create=True, open=True, dtype=ts.dtype(array["dtype"]), shape=array["shape"], chunk_layout=layout
    ).result()


def _convert_piece(public: PublicCheckpoint, piece: Piece, stores: dict[str, ts.TensorStore]) -> None:
    store = stores[piece.path]
    index = piece_index(piece, store.shape)
    kept = store.dtype.numpy_dtype
    store[index].write(read_as(public, piece.path, index, kept)).result()
    if kept == FP8:
        scales = stores[scale_path(piece.path)]
        index = piece_index(piece, scales.shape)
        scales[index].write(public.read_scale(piece.path, index)).result()


def _spec(folder: Path, path: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder.absolute() / "arrays" / _file_name(path))}}


def _file_name(path: str) -> str:
    return path.replace("/", ".")


def _model_config(fields: dict[str, Any]) -> ModelConfig:
    run = to_dict(from_dict(default_config()))
    run["model"] = fields
    run["train"]["sequence_length"] = fields["max_position_embeddings"]
    return from_dict(run).model
