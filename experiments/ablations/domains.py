"""Text of several domains, found on the machine: code, prose, markup and data, as files of 4 KiB in a folder a domain.

Found under Python's own installation and its packages, and under any folder that is named. A file counts by its ending or, for
prose, by its name. Files come in an order that is fixed and mixes packages, and are cut into pieces of which a domain gets
enough; the same text twice counts once, as licences would come dozens of times.
"""

import hashlib
import itertools
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv3_jax.config import ConfigError

ENDINGS = {
    "code": (".py",),
    "prose": (".rst", ".md"),
    "markup": (".html", ".htm", ".xml", ".svg", ".css", ".xsd", ".xsl"),
    "data": (".csv", ".json", ".tsv", ".arff"),
}
PROSE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "METADATA", "CHANGES", "NEWS")
PIECE = 4096  # characters
PIECES_A_FILE = 16  # so that a large file does not make up a domain


def domain_of(path: Path) -> str | None:
    """The domain that a file's name says; None for no domain."""
    by_ending = (name for name, endings in ENDINGS.items() if path.suffix in endings)
    is_prose = path.stem in PROSE_NAMES and path.suffix in ("", ".txt")
    return next(by_ending, "prose" if is_prose else None)


def python_folders() -> list[Path]:
    """Python's standard library and the packages of the environment."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def write_domains(target: Path, sources: Sequence[Path], most: int) -> dict[str, int]:
    """Writes each domain to `target`/DOMAIN, up to `most` bytes and the end of a piece; returns the bytes. What was written is kept.

    Raises ConfigError for a source that is no folder, and for a domain that has nothing.
    """
    for source in sources:
        if not source.is_dir():
            raise ConfigError("--folders", str(source), "is no folder; name folders that hold text")
    if not target.exists():
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            for domain, files in _files(sources).items():
                _write(draft / domain, files, most, domain)
            os.replace(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return {domain: sum(path.stat().st_size for path in (target / domain).iterdir()) for domain in ENDINGS}


def text_source(folder: Path) -> str:
    """`config.data.source` for what `write_domains` wrote there, the same for every spelling of the folder's path."""
    return f"text:{folder.resolve()}/*/*.txt"


def _files(sources: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each domain, in the order of the hashes of their paths below their source."""
    found: dict[str, list[tuple[str, Path]]] = {domain: [] for domain in ENDINGS}
    for source in sources:
        for folder, _, names in source.walk():
            for path in (folder / name for name in names):
                if (domain := domain_of(path)) and path.is_file():
                    found[domain].append((_hash(path.relative_to(source).as_posix().encode()), path))
    return {domain: [path for _, path in sorted(files)] for domain, files in found.items()}


def _write(folder: Path, files: Sequence[Path], most: int, domain: str) -> None:
    folder.mkdir(parents=True)
    written, seen = 0, set[str]()
    for piece in itertools.chain.from_iterable(map(_pieces, files)):
        if written >= most:
            break
        if (name := _hash(piece)) not in seen:
            (folder / f"{name}.txt").write_bytes(piece)
            written += len(piece)
            seen.add(name)
    if not written:
        raise ConfigError("--folders", None, f"no {domain} was found; name folders that have files ending in {', '.join(ENDINGS[domain])}")


def _pieces(path: Path) -> Iterator[bytes]:
    """The start of a file in pieces; nothing of a file that is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
    pieces = (text[start : start + PIECE] for start in range(0, min(len(text), PIECE * PIECES_A_FILE), PIECE))
    yield from (piece.encode() for piece in pieces if piece.strip())


def _hash(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=8).hexdigest()
