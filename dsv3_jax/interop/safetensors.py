"""Reads and writes folders of .safetensors files, the public form of a checkpoint, one tensor at a time.

A file is the length of its header (8 bytes), the header (JSON: dtype, shape and bytes of each tensor), then the bytes of
the tensors without a gap. A checkpoint is one `model.safetensors`, or shards that `model.safetensors.index.json` lists.
The `safetensors` package does not do here: its numpy reader knows no bf16 or fp8 and its writer holds a whole shard in memory.

Files come from anywhere, so nothing in them is believed: whatever is wrong with one is a CheckpointError, raised before
any tensor is read, and reading a folder takes memory for its checked headers only.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

_SINGLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_METADATA = "__metadata__"
_MAX_JSON_BYTES = 100_000_000  # the format's own limit for a header
_MAX_DIMENSIONS = 64  # numpy's
_MAX_BYTES = 2**63 - 1
_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth")
_PICKLE_REMEDY = (
    "is a pickle, which can run code and is never loaded; convert the checkpoint to safetensors first, "
    "with save_pretrained(safe_serialization=True) of transformers for example"
)


class CheckpointError(ValueError):
    """A tensor or file of a checkpoint that cannot be used, and what is wrong with it, in one line."""

    def __init__(self, subject: str, problem: str, file: Path | str | None = None):
        # A name from a file may hold line breaks, or be as long as the file.
        shown = subject if subject.isprintable() and len(subject) <= 400 else f"{subject[:400]!a}"
        super().__init__(f"{shown}: {problem}" if file is None else f"{shown} in {file}: {problem}")
        self.tensor = subject


# --- reading ---


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, read-only and mapped from the file: a page takes memory once it is looked at."""
        if self.nbytes == 0:  # nothing can be mapped
            empty = np.empty(self.shape, self.dtype)
            empty.flags.writeable = False
            return empty
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape))


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a public checkpoint by name, none of them read yet.

    Raises CheckpointError for a folder without safetensors, and for index, shards or tensors that do not fit together.
    """
    weight_map = _read_weight_map(folder)
    shards = [_SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in _read_shard(folder / shard):
            if tensor.name in tensors:
                raise CheckpointError(tensor.name, f"is also in {tensors[tensor.name].file.name}", tensor.file)
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_against_index(tensors, weight_map, folder)
    return tensors


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """Shard of every tensor as the index says, None for a checkpoint of a single file."""
    index = folder / _INDEX_NAME
    if not index.exists():
        if (folder / _SINGLE_NAME).exists():
            return None
        for file in sorted(folder.glob("*")):
            if file.suffix in _PICKLES:
                raise CheckpointError(file.name, _PICKLE_REMEDY, folder)
        raise CheckpointError(str(folder), f"has neither {_INDEX_NAME} nor {_SINGLE_NAME}")
    with _open(index) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError("index", f"has {size} bytes, the limit is {_MAX_JSON_BYTES}", index)
        weight_map = _parse_object(stream.read(size), "index", index).get("weight_map")
    if not _is_text_map(weight_map):
        raise CheckpointError("weight_map", "is missing, or does not map names of tensors to names of files", index)
    for shard in set(weight_map.values()):
        _check_shard_name(shard, index)
    return weight_map


def _check_shard_name(name: str, index: Path) -> None:
    # The name alone must stay in the folder. The file may be a symlink: Hugging Face's cache links to ../../blobs,
    # and whoever can put links in the folder needs no index to point elsewhere.
    if name.endswith(_PICKLES):
        raise CheckpointError(name, _PICKLE_REMEDY, index)
    if not name.endswith(".safetensors") or not name.isprintable() or "/" in name or "\\" in name:
        raise CheckpointError(name, "is not the plain name of a .safetensors file", index)


def _check_against_index(tensors: Mapping[str, StoredTensor], weight_map: Mapping[str, str], folder: Path) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(name, "is missing, the index says that it is there", folder / shard)
        if tensors[name].file.name != shard:
            raise CheckpointError(name, f"belongs in {shard} by the index", tensors[name].file)
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(name, "is not listed in the index", tensor.file)


def _read_shard(file: Path) -> list[StoredTensor]:
    """The tensors of one file, after checking that they cover its data exactly."""
    with _open(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise CheckpointError("header", f"is cut off, the file has {size} bytes", file)
        length = int.from_bytes(stream.read(8), "little")
        if length > _MAX_JSON_BYTES or length > size - 8:
            raise CheckpointError("header", f"claims {length} bytes; {size - 8} follow and the limit is {_MAX_JSON_BYTES}", file)
        header = _parse_object(stream.read(length), "header", file)
    if not _is_text_map(header.pop(_METADATA, {})):
        raise CheckpointError(_METADATA, "does not map text to text", file)
    tensors = [_stored_tensor(name, entry, file, 8 + length) for name, entry in header.items()]
    _check_coverage(tensors, file, 8 + length, size)
    return tensors


def _stored_tensor(name: str, entry: Any, file: Path, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
        raise CheckpointError(name, "is not described by dtype, shape and data_offsets", file)
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(name, f"has dtype {entry['dtype'][:40]!a}, known are {', '.join(_DTYPES)}", file)
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], _DTYPES[entry["dtype"]]
    # numpy makes no array, not even an empty one, whose sizes above 0 multiply to more bytes than it can address.
    if not _is_sizes(shape) or math.prod(size or 1 for size in shape) * dtype.itemsize > _MAX_BYTES:
        raise CheckpointError(name, "has a shape that is not a list of sizes, or too large", file)
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(name, "has data_offsets that are not a begin and an end", file)
    tensor = StoredTensor(name, file, dtype, tuple(shape), data_start + offsets[0])
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(name, f"takes {tensor.nbytes} bytes, its data_offsets are {offsets}", file)
    return tensor


def _check_coverage(tensors: Iterable[StoredTensor], file: Path, data_start: int, file_size: int) -> None:
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "starts after bytes of no tensor"
            raise CheckpointError(tensor.name, f"{problem}, at byte {tensor.offset} instead of {end}", file)
        end += tensor.nbytes
        if end > file_size:
            raise CheckpointError(tensor.name, f"ends at byte {end} of a file that is cut off after {file_size}", file)
    if end != file_size:
        raise CheckpointError("header", f"describes {end} bytes of a file that has {file_size}", file)


def _open(file: Path) -> BinaryIO:
    try:
        if not file.is_file():  # a device or pipe could block, or never end
            raise CheckpointError(str(file), "is missing, or is not a file")
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be opened: {error.strerror}") from error


def _parse_object(text: bytes, subject: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(subject, f"is not JSON that can be read: {error}", file) from None
    if not isinstance(value, dict):
        raise CheckpointError(subject, "is not a JSON object", file)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Of two equal keys readers keep different ones, so there is none to believe."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:400]!a} is there twice")
        result[key] = value
    return result


def _is_text_map(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_sizes(value: Any) -> bool:
    # `type`, as True is an int too. Few and bounded numbers: the product of any others could take minutes.
    return isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(type(n) is int and 0 <= n <= _MAX_BYTES for n in value)


# --- writing ---


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """The tensors, in order, in shards of at most `shard_bytes`; a tensor that is larger has a shard of its own."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def write_folder(
    folder: Path,
    specs: Sequence[TensorSpec],
    read: Callable[[str], np.ndarray],
    shard_bytes: int = 5 * 10**9,
    on_tensor: Callable[[TensorSpec], None] = lambda spec: None,
) -> None:
    """Writes a checkpoint, holding one tensor at a time: what `read` returns for its name. The index comes last.

    A shard that an interrupted run has finished is kept. It is known by header and size, not by its values, so another
    model belongs in another folder. `on_tensor` hears of each tensor that is written or kept. Raises CheckpointError
    for specs that cannot be stored, a value that does not fit its spec, and a folder with files of another checkpoint.
    """
    _check_specs(specs)
    shards = plan_shards(specs, shard_bytes)
    names = [_SINGLE_NAME]
    if len(shards) != 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    _check_other_files(folder, names)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, read, on_tensor)
    if names != [_SINGLE_NAME]:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
        with _draft(folder / _INDEX_NAME) as stream:
            stream.write(json.dumps(index, indent=2).encode())


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    names = {_METADATA}
    for spec in specs:
        if spec.name in names:
            raise CheckpointError(spec.name, "is taken; each tensor needs a name of its own")
        if spec.dtype not in _DTYPE_NAMES:
            raise CheckpointError(spec.name, f"has dtype {spec.dtype}, which cannot be stored")
        names.add(spec.name)


def _check_other_files(folder: Path, names: Sequence[str]) -> None:
    # Readers differ in whether a single file or an index goes first, so the folder may hold only one of them.
    expected = {*names} if names == [_SINGLE_NAME] else {*names, _INDEX_NAME}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(_INDEX_NAME)]):
        if file.name not in expected:
            raise CheckpointError(str(file), "belongs to another checkpoint; write to a folder without one")


def _write_shard(file: Path, shard: list[TensorSpec], read: Callable[[str], np.ndarray], on_tensor: Callable[[TensorSpec], None]) -> None:
    # Wide dtypes first, as torch cannot view bytes as a dtype where they start between two of its elements.
    ordered = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
    start = _file_start(ordered)
    if _is_complete(file, start, len(start) + sum(spec.nbytes for spec in ordered)):
        for spec in ordered:
            on_tensor(spec)
        return
    with _draft(file) as stream:
        stream.write(start)
        for spec in ordered:
            stream.write(_value_bytes(spec, read(spec.name)))  # without a name here, which would keep it while the next is read
            on_tensor(spec)


def _file_start(specs: Iterable[TensorSpec]) -> bytes:
    """Length and header of a file with these tensors, in this order."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    return len(text).to_bytes(8, "little") + text


def _is_complete(file: Path, start: bytes, size: int) -> bool:
    if not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def _value_bytes(spec: TensorSpec, value: np.ndarray) -> memoryview:
    if value.dtype != spec.dtype or value.shape != spec.shape:
        raise CheckpointError(spec.name, f"came as {value.dtype} {value.shape}, not {spec.dtype} {spec.shape}")
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _draft(file: Path) -> Iterator[BinaryIO]:
    """What is written has the name of the file only when it is whole and on the disk: later runs go by name and size."""
    draft = file.with_name(f"{file.name}.draft")
    with draft.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
