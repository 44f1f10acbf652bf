"""Text documents with random access, split into a training and a held-out part.

A corpus is opened from one string (`config.data.source`). Everything that can be wrong with the text is
looked for while it is opened, so that a run fails before its first step and not in the middle of an
epoch; the text itself is read only when a document is asked for. Which documents are held out follows
from a hash of each document's name, so it depends neither on the order nor on the number of documents.
"""

import functools
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int
from tqdm import tqdm

from dsv3_jax.config import ConfigError, DataConfig

FIELD = "config.data.source"
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")  # written when that Python was built, so they differ between machines
_CACHED_ROW_GROUPS = 8


@runtime_checkable
class Documents(Protocol):
    """What the data pipeline needs of a collection of texts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@runtime_checkable
class Source(Documents, Protocol):
    """Documents that have names: a path relative to the source's folder, or path:row."""

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class Subset:
    """The documents of `source` at `indices`, in that order."""

    source: Source
    indices: Int[np.ndarray, " documents"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> str:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents kept for validation."""

    train: Subset
    valid: Subset


def open_corpus(data: DataConfig) -> Corpus:
    """Opens `data.source` and holds out a share `data.held_out` of its documents; 0 (every document to train on) is for evaluation.

    Raises `ConfigError` for a source that cannot be read, or that has too few documents to hold one out.
    """
    source = _open_source(data.source)
    if len(source) == 0:
        raise ConfigError(FIELD, data.source, "has no documents; point it at files that hold text")
    if len(source) < 2 and data.held_out > 0:
        raise ConfigError(FIELD, data.source, "has one document, but holding one out takes two; give at least two")
    held_out = _choose_held_out(source, data.held_out)
    return Corpus(train=Subset(source, np.flatnonzero(~held_out)), valid=Subset(source, np.flatnonzero(held_out)))


def _choose_held_out(source: Source, share: float) -> Bool[np.ndarray, " documents"]:
    """Documents whose hash falls below `share`; at least one and never all of them, where `share` is above 0."""
    names = (source.name(i) for i in range(len(source)))
    hashes = np.array([_unit_hash(name) for name in tqdm(names, "Splitting corpus", len(source), delay=1)])
    held_out = hashes < share
    if share > 0:
        held_out[hashes.argmin()] = True
        held_out[hashes.argmax()] = False
    return held_out


def _unit_hash(name: str) -> float:
    """A number in [0, 1] that is the same for a name on every machine."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest()) / 2**64


def _open_source(source: str) -> Source:
    scheme, _, rest = source.partition(":")
    if source == "stdlib":
        return _open_stdlib()
    if scheme == "text":
        return _open_text(source, rest)
    if scheme == "jsonl":
        return _open_json_lines(source, *_split_field(source, rest))
    if scheme == "parquet":
        return _open_parquet(source, *_split_field(source, rest))
    raise ConfigError(FIELD, source, "unknown source; use stdlib, text:GLOB, jsonl:GLOB#field or parquet:GLOB#column")


def _split_field(source: str, rest: str) -> tuple[str, str]:
    pattern, _, field = rest.rpartition("#")
    if not pattern or not field:
        raise ConfigError(FIELD, source, "does not say where the text is; end it with #name, e.g. #text")
    return pattern, field


def _match(source: str, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to (the part of the pattern without wildcards) and the sorted files."""
    pattern = os.path.expanduser(pattern)
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise ConfigError(FIELD, source, f"no file matches {pattern!r} (seen from {os.getcwd()}); correct the path or the wildcards")
    root = Path(pattern)
    while glob.has_magic(str(root)) or root.is_file():
        root = root.parent
    return root, paths


# --- One file, one document ---


@dataclass(frozen=True)
class _TextFiles:
    root: Path
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> str:
        return self.paths[index].read_bytes().decode("utf-8")

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()


def _open_stdlib() -> _TextFiles:
    """Python sources of the standard library of the running interpreter, without its tests and generated files."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_stdlib_files(root), key=lambda path: path.relative_to(root).as_posix())
    return _TextFiles(root, [path for path in paths if _is_text(path)])


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in root.walk():
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_DIRECTORIES and not name.startswith(_GENERATED_PREFIXES)]
        yield from (folder / name for name in names if name.endswith(".py") and not name.startswith(_GENERATED_PREFIXES))


def _is_text(path: Path) -> bool:
    """True for a file that holds something, all of it UTF-8."""
    try:
        return bool(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _open_text(source: str, pattern: str) -> _TextFiles:
    root, paths = _match(source, pattern)
    paths = [path for path in paths if path.stat().st_size > 0]
    for path in tqdm(paths, "Checking text files", delay=1):
        if not _is_text(path):
            raise ConfigError(FIELD, source, f"{path} is not UTF-8 text; convert it, or narrow the pattern to leave it out")
    return _TextFiles(root, paths)


# --- JSON lines ---


@dataclass(frozen=True)
class _JsonLines:
    source: str
    root: Path
    paths: Sequence[Path]
    field: str
    lines: Int[np.ndarray, "documents 3"]  # file, line number from 1, byte offset of the line

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int, /) -> str:
        file, line, offset = self.lines[index].tolist()
        with open(self.paths[file], "rb") as handle:
            handle.seek(offset)
            return _json_text(self.source, self.field, handle.readline(), f"{self.paths[file]}, line {line}")

    def name(self, index: int) -> str:
        file, line, _ = self.lines[index].tolist()
        return f"{self.paths[file].relative_to(self.root).as_posix()}:{line}"


def _open_json_lines(source: str, pattern: str, field: str) -> _JsonLines:
    root, paths = _match(source, pattern)
    lines = array("q")
    for file, path in enumerate(tqdm(paths, "Indexing JSON lines", delay=1)):
        for line, offset, raw in _numbered_lines(path):
            _json_text(source, field, raw, f"{path}, line {line}")
            lines.extend((file, line, offset))
    return _JsonLines(source, root, paths, field, np.array(lines, np.int64).reshape(-1, 3))


def _numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number, byte offset and bytes of every line that is not blank."""
    offset = 0
    with open(path, "rb") as handle:
        for line, raw in enumerate(handle, start=1):
            if raw.strip():
                yield line, offset, raw
            offset += len(raw)


def _json_text(source: str, field: str, raw: bytes, place: str) -> str:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise ConfigError(FIELD, source, f"{place} is not JSON ({error}); correct or remove the line") from error
    if not isinstance(record, dict):
        raise ConfigError(FIELD, source, f"{place} is not a JSON object; correct or remove the line")
    if field not in record:
        raise ConfigError(FIELD, source, f"{place} has no field {field!r}; it has {', '.join(map(repr, record))}")
    if not _is_unicode(record[field]):
        raise ConfigError(FIELD, source, f"{place}: field {field!r} is not valid text; name a field of Unicode strings")
    return record[field]


def _is_unicode(value: object) -> bool:
    """True for a string without lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


# --- Parquet ---


@dataclass(frozen=True)
class _RowGroup:
    path: Path
    group: int
    first_row: int  # within its file


@dataclass(frozen=True)
class _Parquet:
    """Rows of parquet files. A document costs one column of its row group, decoded, unless it is among the last few read."""

    source: str
    root: Path
    column: str
    groups: Sequence[_RowGroup]
    ends: Int[np.ndarray, " groups"]  # cumulative number of rows

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int, /) -> str:
        group, offset = self._locate(index)
        text = _read_row_group(group.path, group.group, self.column)[offset].as_py()
        if text is None:
            raise ConfigError(FIELD, self.source, f"{self.name(index)}: column {self.column!r} is null; remove such rows")
        return text

    def name(self, index: int) -> str:
        group, offset = self._locate(index)
        return f"{group.path.relative_to(self.root).as_posix()}:{group.first_row + offset}"

    def _locate(self, index: int) -> tuple[_RowGroup, int]:
        position = int(np.searchsorted(self.ends, index, side="right"))
        return self.groups[position], int(index - (self.ends[position - 1] if position else 0))


@functools.lru_cache(maxsize=_CACHED_ROW_GROUPS)
def _read_row_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def _open_parquet(source: str, pattern: str, column: str) -> _Parquet:
    root, paths = _match(source, pattern)
    groups: list[_RowGroup] = []
    sizes: list[int] = []
    for path in tqdm(paths, "Indexing parquet files", delay=1):
        rows = _row_group_sizes(source, path, column)
        starts = itertools.accumulate(rows[:-1], initial=0)
        groups += [_RowGroup(path, group, start) for group, start in zip(range(len(rows)), starts, strict=False)]
        sizes += rows
    return _Parquet(source, root, column, groups, np.cumsum(sizes, dtype=np.int64))


def _row_group_sizes(source: str, path: Path, column: str) -> list[int]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(FIELD, source, f"{path} is not a parquet file; narrow the pattern to leave it out") from error
    schema = file.schema_arrow
    if column not in schema.names:
        raise ConfigError(FIELD, source, f"{path} has no column {column!r}; it has {', '.join(map(repr, schema.names))}")
    if schema.field(column).type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ConfigError(FIELD, source, f"{path}: column {column!r} holds {schema.field(column).type}; name a column of strings")
    return [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
