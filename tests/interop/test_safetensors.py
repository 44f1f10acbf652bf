"""Files of tensors: agreement with the safetensors package, and every way in which one can be wrong."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.interop.safetensors import CheckpointError, TensorSpec, plan_shards, read_folder, write_folder

INDEX = "model.safetensors.index.json"
NUMPY_DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
DTYPES = [*map(np.dtype, (*NUMPY_DTYPES, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))]
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
NEXT = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}


def sample(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)


def write(folder: Path, tensors: dict[str, np.ndarray], **options) -> list[str]:
    """Writes the folder; the names that were asked for, in that order."""
    asked = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return tensors[name]

    write_folder(folder, [TensorSpec(name, value.dtype, value.shape) for name, value in tensors.items()], read, **options)
    return asked


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def folder_of(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_folder(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500
    return message


# --- what is written can be read ---


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_round_trip_of_every_dtype_and_of_empty_and_scalar_tensors(tmp_path, shard_bytes):
    shapes = [(), (0,), (3, 0, 2), (3,), (2, 3)]
    tensors = {f"{dtype}{shape}": sample(dtype, shape) for dtype in DTYPES for shape in shapes}
    write(tmp_path, tensors, shard_bytes=shard_bytes)
    stored = read_folder(tmp_path)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        got = stored[name].read()
        assert (stored[name].dtype, stored[name].shape) == (got.dtype, got.shape) == (value.dtype, value.shape)
        assert got.tobytes() == value.tobytes() and not got.flags.writeable


def test_the_package_reads_what_is_written(tmp_path):
    tensors = {dtype: sample(np.dtype(dtype), (3, 5)) for dtype in reversed(NUMPY_DTYPES)}
    write(tmp_path, tensors)
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {name: (value.dtype, value.tolist()) for name, value in read.items()} == {
        name: (value.dtype, value.tolist()) for name, value in tensors.items()
    }
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_reads_what_the_package_writes(tmp_path):
    tensors = {dtype: sample(np.dtype(dtype), (3, 5)) for dtype in NUMPY_DTYPES} | {"scalar": np.array(1.5), "empty": np.zeros((0, 2))}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    stored = read_folder(tmp_path)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(stored[name].read(), value, strict=True)


def test_a_view_is_written_as_its_values(tmp_path):
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    write(tmp_path, {"a": value})
    np.testing.assert_array_equal(read_folder(tmp_path)["a"].read(), value)


def test_shards_and_index_have_the_public_names_and_keep_the_order(tmp_path):
    write(tmp_path, {name: np.ones(size, np.uint8) for name, size in {"a": 3, "b": 3, "large": 20, "c": 1}.items()}, shard_bytes=6)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index == {
        "metadata": {"total_size": 27},
        "weight_map": {"a": shards[0], "b": shards[0], "large": shards[1], "c": shards[2]},
    }
    assert {file.name for file in tmp_path.iterdir()} == {*shards, INDEX}
    assert all(int.from_bytes((tmp_path / shard).read_bytes()[:8], "little") % 8 == 0 for shard in shards)


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 12))
@FUZZ
def test_a_plan_keeps_the_order_and_the_limit(sizes, limit):
    specs = [TensorSpec(str(i), np.dtype(np.uint8), (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(specs, limit)
    assert [spec for shard in shards for spec in shard] == specs
    assert all(len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit for shard in shards)


def test_wide_dtypes_start_at_multiples_of_their_size(tmp_path):
    write(tmp_path, {"narrow": np.ones(3, np.uint8), "wide": np.ones(3, np.float64), "half": np.ones(3, np.float16)})
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in read_folder(tmp_path).values())


def test_a_later_run_keeps_finished_shards_and_writes_the_others(tmp_path):
    tensors = {name: np.full(8, i, np.float32) for i, name in enumerate("abcd")}
    specs = [TensorSpec(name, value.dtype, value.shape) for name, value in tensors.items()]

    def fail_at_c(name: str) -> np.ndarray:
        if name == "c":
            raise KeyboardInterrupt
        return tensors[name]

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, specs, fail_at_c, shard_bytes=32)
    assert not (tmp_path / INDEX).exists()
    cut = tmp_path / "model-00002-of-00004.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    heard: list[str] = []
    assert write(tmp_path, tensors, shard_bytes=32, on_tensor=lambda spec: heard.append(spec.name)) == ["b", "c", "d"]
    assert heard == list("abcd") and not list(tmp_path.glob("*.draft"))
    assert {name: tensor.read().tolist() for name, tensor in read_folder(tmp_path).items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


def test_a_shard_with_another_header_is_written_again(tmp_path):
    write(tmp_path, {"a": np.zeros(2, np.float32)})
    assert write(tmp_path, {"b": np.zeros(2, np.float32)}) == ["b"]


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ([("a", "u1", (2,)), ("a", "u1", (2,))], "a: is taken"),
        ([("__metadata__", "u1", (2,))], "__metadata__: is taken"),
        ([("a", "c8", (2,))], "a: has dtype complex64"),
        ([("a", ">f4", (2,))], "a: has dtype >f4"),
        ([("a", "u1", (3,))], r"a: came as uint8 \(2,\), not uint8 \(3,\)"),
        ([("a", "i1", (2,))], r"a: came as uint8 \(2,\), not int8 \(2,\)"),
    ],
)
def test_what_cannot_be_written(tmp_path, specs, match):
    with pytest.raises(CheckpointError, match=match):
        write_folder(tmp_path, [TensorSpec(name, np.dtype(dtype), shape) for name, dtype, shape in specs], lambda _: np.zeros(2, np.uint8))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(("first", "then"), [(1, 100), (100, 1), (1, 2)])
def test_two_checkpoints_do_not_share_a_folder(tmp_path, first, then):
    tensors = {name: np.zeros(1, np.uint8) for name in "abcd"}
    write(tmp_path, tensors, shard_bytes=first)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        write(tmp_path, tensors, shard_bytes=then)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    specs = [TensorSpec(name, np.dtype(np.uint8), (10**6,)) for name in "abcd"]
    tracemalloc.start()
    try:
        write_folder(tmp_path, specs, lambda _: np.zeros(10**6, np.uint8))
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 10**6
    finally:
        tracemalloc.stop()


# --- folders that cannot be used ---


def test_a_shard_may_be_a_symlink_as_in_the_cache_of_hugging_face(tmp_path):
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blob").write_bytes(file_of({"a": ONE}, b"data"))
    (snapshot / "model.safetensors").symlink_to("../../blob")
    assert read_folder(snapshot)["a"].read().tobytes() == b"data"


A, B = file_of({"a": ONE}, b"data"), file_of({"b": ONE}, b"data")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither model.safetensors.index.json nor model.safetensors"),
        ({"other.safetensors": A}, "has neither"),
        ({"pytorch_model.bin": b""}, "pytorch_model.bin in .*: is a pickle.*convert"),
        ({"weights.pt": b""}, "is a pickle"),
        ({"consolidated.00.pth": b""}, "is a pickle"),
        ({INDEX: {"weight_map": {"a": "pytorch_model.bin"}}}, "pytorch_model.bin in .*index.json: is a pickle"),
        ({INDEX: b"{"}, "index in .*: is not JSON"),
        ({INDEX: b"\xff"}, "is not JSON"),
        ({INDEX: b"[" * 100_000}, "is not JSON.*recursion"),
        ({INDEX: b'{"a":' * 100_000}, "is not JSON.*recursion"),
        ({INDEX: b'{"a": ' + b"1" * 5000 + b"}"}, "is not JSON"),
        ({INDEX: []}, "is not a JSON object"),
        ({INDEX: {}}, "weight_map in .*: is missing"),
        ({INDEX: {"weight_map": ["a"]}}, "weight_map in .*: is missing, or"),
        ({INDEX: {"weight_map": {"a": 1}}}, "weight_map in .*: is missing, or"),
        ({INDEX: b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'}, "key 'a' is there twice"),
        ({INDEX: {"weight_map": {"a": "x.safetensors"}}}, "x.safetensors: is missing"),
        ({INDEX: {"weight_map": {"a": "a" * 300 + ".safetensors"}}}, "cannot be opened"),
        ({INDEX: {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}, "x.safetensors": A}, "b in .*x.safetensors: is missing"),
        (
            {INDEX: {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, "x.safetensors": B, "y.safetensors": A},
            "a in .*y.safetensors: belongs in x.safetensors",
        ),
        (
            {INDEX: {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, "x.safetensors": A, "y.safetensors": A},
            "a in .*y.safetensors: is also in x.safetensors",
        ),
        (
            {INDEX: {"weight_map": {"a": "x.safetensors"}}, "x.safetensors": file_of({"a": ONE, "b": NEXT}, b"8 bytes.")},
            "b in .*x.safetensors: is not listed",
        ),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tmp_path, files, message):
    folder_of(tmp_path, files)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)
    refusal(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "d/x.safetensors", "d\\x.safetensors", "..", ".", "", "x",
                                  "\0.safetensors", "\ud800.safetensors", "x\n.safetensors"])  # fmt: skip
def test_names_of_shards_that_are_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder_of(tmp_path, {"x.safetensors": A})
    assert "is not the plain name" in refusal(folder_of(folder, {INDEX: {"weight_map": {"a": name}}}))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is not a file" in refusal(tmp_path)


def test_an_index_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(100_000_001)  # sparse
    assert "the limit is" in refusal(tmp_path)


# --- files that cannot be used ---


def entry(**changes: object) -> bytes:
    return file_of({"a": ONE | changes}, b"data")


def two(begin: int, end: int, data: int) -> bytes:
    return file_of({"b": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}, "a": ONE}, b"d" * data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header in .*: is cut off, the file has 0 bytes"),
        (b"1234567", "is cut off"),
        ((2**60).to_bytes(8, "little") + b"{}", "header in .*: claims 1152921504606846976 bytes"),
        ((2**64 - 1).to_bytes(8, "little"), "claims"),
        ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes; 2 follow"),
        (file_of(b""), "is not JSON"),
        (file_of(b"{"), "is not JSON"),
        (file_of(b'{"\xff": 1}'), "is not JSON"),
        (file_of(json.dumps({"a": ONE}).encode("utf-16"), b"data"), "is not JSON"),
        (file_of(b"[" * 100_000), "is not JSON.*recursion"),
        (file_of(b'{"a":' * 100_000), "is not JSON.*recursion"),
        (file_of(b'{"a": ' + b"1" * 5000 + b"}"), "is not JSON"),
        (file_of([]), "header in .*: is not a JSON object"),
        (file_of(b'{"a": {}, "a": {}}'), "key 'a' is there twice"),
        (file_of(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', b"data"), "key 'dtype' is there twice"),
        (file_of({"__metadata__": {"format": 1}}), "__metadata__ in .*: does not map text to text"),
        (file_of({"__metadata__": "pt"}), "does not map"),
        (file_of({"a": 1}), "a in .*model.safetensors: is not described"),
        (file_of({"a": {"dtype": "U8", "shape": [4]}}, b"data"), "is not described"),
        (entry(more=1), "is not described"),
        (entry(dtype=["U8"]), "is not described"),
        (entry(dtype="F4"), "a in .*: has dtype 'F4', known are F64"),
        (entry(shape=4), "a in .*: has a shape"),
        (entry(shape=[-4]), "has a shape"),
        (entry(shape=[4.0]), "has a shape"),
        (entry(shape=[4, True]), "has a shape"),
        (entry(shape=["4"]), "has a shape"),
        (entry(shape=[1] * 65), "has a shape"),
        (entry(shape=[2**63]), "has a shape"),
        (entry(shape=[2**32, 2**32, 4]), "has a shape"),
        (entry(shape=[0, 2**62, 2**62]), "has a shape"),
        (entry(shape=[0, 2**62], dtype="F32"), "has a shape"),
        (entry(data_offsets=4), "has data_offsets"),
        (entry(data_offsets=[4]), "has data_offsets"),
        (entry(data_offsets=[0, 4, 4]), "has data_offsets"),
        (entry(data_offsets=[-4, 0]), "has data_offsets"),
        (entry(data_offsets=[0, 4.0]), "has data_offsets"),
        (entry(data_offsets=[False, 4]), "has data_offsets"),
        (entry(data_offsets=[0, 2**64]), "has data_offsets"),
        (entry(data_offsets=[4, 0]), "a in .*: takes 4 bytes"),
        (entry(data_offsets=[0, 3]), "takes 4 bytes"),
        (entry(dtype="F32"), "takes 16 bytes"),
        (entry(data_offsets=[2**62, 2**62 + 4]), "a in .*: starts after bytes of no tensor"),
        (entry(data_offsets=[1, 5]), "starts after bytes of no tensor"),
        (entry(shape=[5], data_offsets=[0, 5]), "a in .*: ends at byte .* cut off"),
        (entry(shape=[2**60], data_offsets=[0, 2**60]), "cut off"),
        (entry(shape=[3], data_offsets=[0, 3]), "header in .*: describes"),
        (file_of({}, b"d"), "header in .*: describes"),
        (two(2, 6, 6), "b in .*: overlaps"),
        (two(0, 4, 4), "in .*: overlaps"),
        (two(5, 9, 9), "b in .*: starts after"),
        (two(4, 9, 8), "b in .*: ends at byte"),
        (two(4, 8, 9), "header in .*: describes"),
        (two(2, 2, 4), "overlaps"),
        (file_of({"a\nb": 1}), r"'a\\nb' in .*: is not described"),
        (file_of({"a" * 100_000: 1}), "is not described"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, content, message):
    folder_of(tmp_path, {"model.safetensors": content})
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)
    refusal(tmp_path)


def test_a_refusal_names_its_tensor(tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_folder(folder_of(tmp_path, {"model.safetensors": entry(dtype="F4")}))
    assert error.value.tensor == "a"
    assert str(CheckpointError("a", "is missing")) == "a: is missing"


def test_a_claimed_size_takes_no_memory(tmp_path):
    with folder_of(tmp_path, {"model.safetensors": (2 * 10**8).to_bytes(8, "little")}).joinpath("model.safetensors").open("ab") as file:
        file.truncate(4 * 10**8)  # sparse
    tracemalloc.start()
    try:
        assert "claims" in refusal(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


# --- random files ---


def refused_or_readable(files: dict[str, object]) -> None:
    """Either a CheckpointError, or tensors that can all be read and agree with their description."""
    with tempfile.TemporaryDirectory() as name:
        try:
            tensors = read_folder(folder_of(Path(name), files))
        except CheckpointError as error:
            assert "\n" not in str(error)
            return
        for tensor in tensors.values():
            value = tensor.read()
            assert (value.shape, value.dtype, value.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)


@given(st.binary(max_size=200), st.booleans())
@FUZZ
def test_random_bytes(content, with_length):
    refused_or_readable({"model.safetensors": file_of(content) if with_length else content})


VALID = file_of(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
    },
    b"0123456789",
)


@given(st.dictionaries(st.integers(0, len(VALID) - 1), st.integers(0, 255), max_size=4), st.integers(0, len(VALID)))
@FUZZ
def test_random_changes_of_a_valid_file(changes, length):
    content = bytearray(VALID)
    for position, byte in changes.items():
        content[position] = byte
    refused_or_readable({"model.safetensors": bytes(content)})
    refused_or_readable({"model.safetensors": bytes(content[:length])})


NUMBERS = st.one_of(st.integers(-2, 9), st.integers(), st.sampled_from([2**31, 2**62, 2**63, 2**64]), st.booleans(), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "BOOL"]), VALUES),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), VALUES),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), VALUES),
    }
)
HEADERS = st.one_of(VALUES, st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(ENTRIES, VALUES), max_size=3))
SHARD_NAMES = st.one_of(st.sampled_from(["x.safetensors", "y.safetensors", "..", "x.bin"]), st.text(max_size=5), VALUES)
INDICES = st.one_of(VALUES, st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from("abc"), SHARD_NAMES, max_size=3)}))


@given(HEADERS, st.integers(0, 9))
@FUZZ
def test_random_headers(header, data):
    refused_or_readable({"model.safetensors": file_of(header, b"d" * data)})


@given(INDICES)
@FUZZ
def test_random_indices(index):
    refused_or_readable({INDEX: index, "x.safetensors": A, "y.safetensors": B})
