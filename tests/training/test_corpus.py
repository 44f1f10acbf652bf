"""Sources of text, their random access, the held-out split, and what is said about text that cannot be used."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.training.corpus import Corpus, Subset, open_corpus


def _write_texts(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")


def _write_parquet(path: Path, texts: list[str | None], row_group_size: int) -> None:
    table = pa.table({"text": pa.array(texts, pa.string()), "size": list(range(len(texts)))})
    pq.write_table(table, path, row_group_size=row_group_size)


def _open(source: str, held_out: float = 0.0) -> Corpus:
    return open_corpus(DataConfig(source=source, held_out=held_out))


def _names(subset: Subset) -> list[str]:
    return [subset.name(i) for i in range(len(subset))]


def _texts(subset: Subset) -> list[str]:
    return [subset[i] for i in range(len(subset))]


def test_stdlib_is_the_library_without_its_tests_in_a_fixed_order() -> None:
    corpus = open_corpus(DataConfig())
    train, valid = _names(corpus.train), _names(corpus.valid)
    assert {"json/decoder.py", "asyncio/tasks.py", "os.py"} <= {*train, *valid}
    assert not any({"test", "tests", "site-packages", "idle_test"} & set(name.split("/")) for name in train + valid)
    assert not any(name.startswith(("/", "_sysconfigdata")) for name in train + valid)
    assert train == sorted(train)
    assert not set(train) & set(valid)
    assert 0.02 < len(valid) / len(train + valid) < 0.09
    assert "def decode" in dict(zip(train + valid, _texts(corpus.train) + _texts(corpus.valid), strict=True))["json/decoder.py"]


def test_held_out_documents_stay_the_same_when_others_come_and_wherever_they_lie(tmp_path: Path) -> None:
    names = [f"{i}.txt" for i in range(60)]
    _write_texts(tmp_path / "here", names)
    _write_texts(tmp_path / "there", names + [f"more/{i}.txt" for i in range(60)])
    first = set(_names(_open(f"text:{tmp_path}/here/*.txt", 0.3).valid))
    second = set(_names(_open(f"text:{tmp_path}/there/**/*.txt", 0.3).valid))
    assert first == {name for name in second if not name.startswith("more/")}
    assert 5 < len(first) < 35


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (1e-9, 1), (0.999999, 2)])
def test_split_leaves_something_on_both_sides(tmp_path: Path, share: float, held_out: int) -> None:
    _write_texts(tmp_path, ["a.txt", "b.txt", "c.txt"])
    corpus = _open(f"text:{tmp_path}/*.txt", share)
    assert (len(corpus.train), len(corpus.valid)) == (3 - held_out, held_out)


def test_text_glob_recurses_and_keeps_every_byte(tmp_path: Path) -> None:
    _write_texts(tmp_path, ["a.md", "x/b.md", "x/y/c.md", "x/y/d.txt"])
    (tmp_path / "x/e.md").write_bytes("ligne é\r\n".encode())
    (tmp_path / "empty.md").write_bytes(b"")
    train = _open(f"text:{tmp_path}/**/*.md").train
    assert _names(train) == ["a.md", "x/b.md", "x/e.md", "x/y/c.md"]
    assert train[2] == "ligne é\r\n"


def test_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_texts(tmp_path, ["a.txt", "x/b.txt"])
    monkeypatch.chdir(tmp_path)
    assert _names(_open("text:*.txt").train) == ["a.txt"]
    assert _names(_open("text:x/b.txt").train) == ["b.txt"]


def test_json_lines_are_read_in_any_order(tmp_path: Path) -> None:
    texts = [f"line {i} é\n" for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"n": i, "body": text}, ensure_ascii=False) for i, text in enumerate(texts)))
    (tmp_path / "b.jsonl").write_text('{"body": "last"}\n')
    train = _open(f"jsonl:{tmp_path}/*.jsonl#body").train
    assert [train[i] for i in (4, 5, 0)] == [texts[4], "last", texts[0]]
    assert _names(train) == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:7", "a.jsonl:9", "b.jsonl:1"]


def test_parquet_is_read_in_any_order(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "a.parquet", [f"a{i}" for i in range(25)], row_group_size=2)
    _write_parquet(tmp_path / "b.parquet", [f"b{i}" for i in range(3)], row_group_size=10)
    train = _open(f"parquet:{tmp_path}/*.parquet#text").train
    everything = [f"a{i}" for i in range(25)] + ["b0", "b1", "b2"]
    assert [train[i] for i in reversed(range(28))] == everything[::-1]
    assert [train.name(i) for i in (0, 24, 25, 27)] == ["a.parquet:0", "a.parquet:24", "b.parquet:0", "b.parquet:2"]


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "one.txt").write_text("alone")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "lacking.jsonl").write_text('{"text": "fine"}\n\n{"title": "a", "body": "b"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "fake.parquet").write_text("no parquet")
    _write_parquet(tmp_path / "good.parquet", ["a", "b"], row_group_size=2)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("texts:x", ["unknown source", "stdlib", "text:GLOB", "jsonl:GLOB#field", "parquet:GLOB#column"]),
        ("text:{}/*.nothing", ["no file matches", "*.nothing"]),
        ("text:{}/latin.txt", ["latin.txt is not UTF-8"]),
        ("text:{}/one.txt", ["has one document", "at least two"]),
        ("text:{}/empty.txt", ["has no documents"]),
        ("jsonl:{}/broken.jsonl", ["end it with #name"]),
        ("jsonl:{}/broken.jsonl#", ["end it with #name"]),
        ("jsonl:{}/broken.jsonl#text", ["broken.jsonl, line 2 is not JSON"]),
        ("jsonl:{}/list.jsonl#text", ["list.jsonl, line 1 is not a JSON object"]),
        ("jsonl:{}/lacking.jsonl#text", ["lacking.jsonl, line 3 has no field 'text'", "'title', 'body'"]),
        ("jsonl:{}/number.jsonl#text", ["number.jsonl, line 1", "not valid text"]),
        ("jsonl:{}/surrogate.jsonl#text", ["surrogate.jsonl, line 1", "not valid text"]),
        ("parquet:{}/fake.parquet#text", ["fake.parquet is not a parquet file"]),
        ("parquet:{}/good.parquet#body", ["no column 'body'", "'text', 'size'"]),
        ("parquet:{}/good.parquet#size", ["column 'size' holds int64"]),
    ],
)
def test_unusable_sources_are_named(bad_files: Path, source: str, parts: list[str]) -> None:
    source = source.format(bad_files)
    with pytest.raises(ConfigError) as caught:
        _open(source, held_out=0.1)
    message = str(caught.value)
    assert message.startswith(f"config.data.source = {source!r}: ")
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_one_document_is_enough_to_train_on(bad_files: Path) -> None:
    assert _texts(_open(f"text:{bad_files}/one.txt").train) == ["alone"]


def test_null_in_parquet_is_named(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "a.parquet", ["a", None], row_group_size=2)
    train = _open(f"parquet:{tmp_path}/a.parquet#text").train
    with pytest.raises(ConfigError, match=r"a.parquet:1: column 'text' is null"):
        train[1]
