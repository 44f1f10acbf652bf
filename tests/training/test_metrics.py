"""The record of a run: exact resumption, damaged files, values that are not finite, MaxVio."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.training.metrics import MetricsWriter, max_vio, read_jsonl, write_json

LAYERS = ["layer 1", "mtp 1"]


def row(step: int) -> dict:
    return {"step": step, "loss": 7.0 / step, "tokens": 64 * step}


def load(step: int) -> np.ndarray:
    return np.roll(np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], np.float32), step, axis=1)


def record(workdir: Path, first: int, last: int) -> None:
    with MetricsWriter(workdir, resume_step=first - 1) as writer:
        for step in range(first, last + 1):
            writer.write(row(step))
            writer.write_load(step, load(step), LAYERS)


def contents(workdir: Path) -> tuple[bytes, bytes]:
    return (workdir / "metrics.jsonl").read_bytes(), (workdir / "expert_load.jsonl").read_bytes()


def test_killed_and_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path):
    record(tmp_path / "undisturbed", 1, 9)
    killed = tmp_path / "killed"
    record(killed, 1, 7)
    for name in ("metrics.jsonl", "expert_load.jsonl"):  # SIGKILL in the middle of writing step 7
        whole = (killed / name).read_bytes()
        (killed / name).write_bytes(whole[:-9])
    record(killed, 5, 9)  # from the checkpoint of step 4
    assert contents(killed) == contents(tmp_path / "undisturbed")


def test_resuming_at_the_half_written_step_keeps_all_whole_lines(tmp_path):
    record(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricsWriter(tmp_path, resume_step=4):
        pass
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")


def test_new_run_starts_with_empty_files(tmp_path):
    record(tmp_path, 1, 3)
    with MetricsWriter(tmp_path, resume_step=0):
        assert contents(tmp_path) == (b"", b"")


def test_a_whole_last_line_without_its_line_break_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    record(tmp_path, 3, 3)
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["{broken", '["step"]', '{"loss": 1.0}', '{"step": "two"}', ""])
def test_damaged_line_is_named_and_neither_file_changes(tmp_path, damage):
    record(tmp_path, 1, 4)
    lines = (tmp_path / "expert_load.jsonl").read_text().splitlines()
    lines[1] = damage
    (tmp_path / "expert_load.jsonl").write_text("\n".join(lines) + "\n")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"expert_load\.jsonl:2 = .*delete that line") as error:
        MetricsWriter(tmp_path, resume_step=2)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_lines_are_on_disk_before_the_writer_closes(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(row(1))
        writer.write_load(1, load(1), LAYERS)
        assert read_jsonl(tmp_path / "metrics.jsonl") == [row(1)]
        (loads,) = read_jsonl(tmp_path / "expert_load.jsonl")
    np.testing.assert_allclose(loads["load"], load(1), atol=1e-6)
    assert loads["layers"] == LAYERS


def test_values_that_are_not_finite_become_null_and_arrays_become_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        values = {"loss": float("nan"), "grad_norm": np.float32("inf"), "mtp_loss": jnp.float32("-inf"), "skipped": jnp.int32(1)}
        writer.write({"step": 1, **values, "learning_rate": np.float32(0.5)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None, "mtp_loss": None, "skipped": 1, "learning_rate": 0.5,
    }  # fmt: skip


def test_load_must_have_a_row_for_each_layer(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="2 rows for 1 layers"):
        writer.write_load(1, load(1), ["layer 1"])


def test_tensorboard_is_told_what_a_resumed_run_replaces(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    record(tmp_path, 1, 3)
    record(tmp_path, 3, 4)
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.name.rpartition(".")[2])
    first, second = ([Event.FromString(data) for data in tfrecords(file)] for file in files)
    losses = [{e.step: v.simple_value for e in events for v in e.summary.value if v.tag == "train/loss"} for events in (first, second)]
    assert losses == [pytest.approx({1: 7.0, 2: 3.5, 3: 7 / 3}), pytest.approx({3: 7 / 3, 4: 1.75})]
    assert [e.step for e in second if e.session_log.status == SessionLog.START] == [3]


def tfrecords(file: Path) -> list[bytes]:
    data, records = file.read_bytes(), []
    while data:  # u64 length, u32 checksum, payload, u32 checksum
        size = int.from_bytes(data[:8], "little")
        records.append(data[12 : 12 + size])
        data = data[16 + size :]
    return records


def test_json_is_replaced_only_by_a_whole_file(tmp_path):
    write_json(tmp_path / "summary.json", {"val_loss": float("inf"), "steps": np.int64(3)})
    before = (tmp_path / "summary.json").read_text()
    assert json.loads(before) == {"val_loss": None, "steps": 3}
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"steps": object()})
    assert (tmp_path / "summary.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_max_vio_by_hand():
    counts = np.array([[4, 4, 4, 4], [8, 4, 4, 0], [16, 0, 0, 0]])
    np.testing.assert_allclose(max_vio(counts), [0.0, 1.0, 3.0])
    np.testing.assert_allclose(jax.jit(max_vio)(jnp.asarray(counts) / 16), [0.0, 1.0, 3.0])
    assert max_vio(jnp.asarray(counts[1])).shape == ()
