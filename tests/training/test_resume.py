"""A run that is killed, stopped or damaged ends with the metrics of one that was left alone."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(workdir, *overrides):
    """Starts experiments.pretrain on the micro configuration."""
    command = [sys.executable, "-m", "experiments.pretrain", "--config=tests/micro_config.py", f"--workdir={workdir}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, status=0):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    output = finish(launch(workdir))
    assert "validation loss" in output
    return workdir


def trajectory(workdir):
    """Every line of metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def assert_same_run(workdir, undisturbed):
    assert trajectory(workdir) == trajectory(undisturbed)
    for name in ("expert_load.jsonl", "samples.json"):
        assert (workdir / name).read_text() == (undisturbed / name).read_text()
    summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, undisturbed)]
    for key in ("val_loss", "val_bits_per_byte", "mtp_accuracy", "ema_val_loss", "tokens"):
        assert summaries[0][key] == summaries[1][key], key


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def run_until(process, workdir, count):
    """Waits for so many lines of metrics."""
    limit = time.monotonic() + 200
    while lines(workdir) < count and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    assert process.poll() is None, f"ended before line {count}: {process.communicate()[0]}"


def test_undisturbed_run_leaves_what_it_promises(undisturbed):
    rows = trajectory(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert {"loss", "mtp_loss", "max_vio", "learning_rate", "grad_norm", "tokens", "balance_loss"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val_loss" in row] == [9, 18, 24]
    assert (rows[0]["batch_size"], rows[-1]["batch_size"]) == (2, 4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    for name in ("config.json", "tokenizer.json", "report.html", "checkpoints/24", "samples.json"):
        assert (undisturbed / name).exists(), name
    assert list((undisturbed / "tensorboard").iterdir())


def test_killed_at_any_moment(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    moments = random.Random(0)
    process = launch(workdir)
    while not (workdir / "config.json").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    for count in (1, 10, 19):
        process = launch(workdir)
        run_until(process, workdir, count)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.wait()
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')  # what a kill in the middle of a write leaves
    finish(launch(workdir))
    assert_same_run(workdir, undisturbed)


def test_sigterm_saves_and_ends_well(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = launch(workdir)
    run_until(process, workdir, 10)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "saved" in output
    assert "continues" in output
    stopped_at = lines(workdir)
    assert 10 <= stopped_at < 24
    assert (workdir / "checkpoints" / str(stopped_at)).exists()
    finish(launch(workdir))
    assert_same_run(workdir, undisturbed)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "unsealed"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(undisturbed, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    (workdir / "summary.json").unlink()
    file = largest_file(workdir / "checkpoints" / "24")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 3 :]
    file.write_bytes(content)
    if damage == "unsealed":  # killed before its digests were noted: the reader itself must find out
        (workdir / "checkpoints" / "digests" / "24.json").unlink()
    output = finish(launch(workdir))
    assert "checkpoints/24 is damaged" in output
    assert "continuing after step 18" in output
    assert_same_run(workdir, undisturbed)


def test_a_finished_run_says_so_and_goes_on_when_asked(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    assert "is done: 24 steps" in finish(launch(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    finish(launch(workdir, "--config.train.steps=27"))
    assert trajectory(workdir)[:24] == trajectory(undisturbed)
    assert lines(workdir) == 27


def test_another_model_is_refused_before_anything_is_written(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    output = finish(launch(undisturbed, "--config.model.hidden_size=32"), status=2)
    assert "config.model.hidden_size = 32" in output
    assert "24" in output
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
    workdir = tmp_path / "run"
    output = finish(launch(workdir, "--config.optimizer.peak_lr=1e38", "--config.train.max_skipped_steps=3"), status=1)
    assert "3 steps in a row" in output
    rows = trajectory(workdir)
    assert [row["skipped"] for row in rows[-3:]] == [1, 1, 1]
    assert (workdir / "checkpoints" / str(rows[-1]["step"])).exists()


def test_trained_run_generates_and_evaluates(undisturbed):
    def run(*arguments):
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)

    written = [
        run("experiments.generate", f"--workdir={undisturbed}", "--prompt=def read(", "--max_tokens=8", "--seed=1") for _ in range(2)
    ]
    assert written[0].returncode == 0, written[0].stderr
    assert written[0].stdout.startswith("def read(")
    assert written[0].stdout == written[1].stdout
    evaluated = run("experiments.evaluate", f"--workdir={undisturbed}", "--ema", "--data=text:dsv3_jax/model/*.py", "--sequences=8")
    assert evaluated.returncode == 0, evaluated.stderr
    assert 0 < json.loads(evaluated.stdout)["bits_per_byte"] < 10
