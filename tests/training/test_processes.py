"""Two processes of four devices train as one of eight does; whatever ends one ends both, and both continue exactly."""

import json
import re
import signal
import socket

import pytest

from dsv3_jax.config import from_config_dict
from dsv3_jax.training.loop import pretrain
from tests import micro_config
from tests.training.test_resume import finish, launch, run_until, trajectory

pytestmark = pytest.mark.slow

CHANGES = {
    "model.num_hidden_layers": 1, "model.first_k_dense_replace": 0, "model.num_nextn_predict_layers": 0,
    "data.num_shards": 4, "train.steps": 8, "train.micro_batch_size": 8, "train.batch_size": 16, "train.batch_size_start": 8,
    "train.batch_ramp_tokens": 600.0, "train.eval_every": 4, "train.eval_sequences": 8, "checkpoint.every": 2,
    "parallel.mesh.data": 2, "parallel.mesh.node": 2, "parallel.mesh.gpu": 2,
}  # fmt: skip
HEARTBEAT = 10  # seconds
BOUND = 30  # seconds after which the loss of a process has ended the other


def launch_two(workdir, *overrides):
    """Both processes, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [f"--config.{field}={value}" for field, value in CHANGES.items()]
    flags += ["--host_devices=4", f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--heartbeat_timeout={HEARTBEAT}"]
    return [launch(workdir, *flags, f"--process_id={i}", *overrides) for i in range(2)]


def spoke(output):
    """Whether a process printed more than what gloo prints of its connections."""
    return re.search(r"INFO|compiling|stopped|step/s|error|validation", output) is not None


def alone(workdir):
    """The same run in one process, this one, which has eight devices."""
    config = micro_config.get_config()
    config.update_from_flattened_dict(CHANGES)
    assert pretrain(from_config_dict(config), workdir, "") == 0


def stop_one(workdir):
    """Tells one process to stop at about step 2; both save the same step and end well. Returns the step."""
    processes = launch_two(workdir)
    run_until(processes[0], workdir, 2)
    processes[1].send_signal(signal.SIGTERM)
    main, other = map(finish, processes)
    assert not spoke(other)
    (step,) = re.findall(r"stopped by a signal after step (\d+), saved", main)
    assert (workdir / "checkpoints" / step / "commit_success.txt").exists()
    return int(step)


def kill_one(workdir, step):
    """Kills one process after `step`; the other says so and ends soon. Returns what was reported until then."""
    processes = launch_two(workdir)
    run_until(processes[0], workdir, step)
    processes[1].kill()
    output, _ = processes[0].communicate(timeout=BOUND)
    assert processes[0].returncode not in (0, 2)
    assert re.search("another (process|task)", output), output
    processes[1].communicate()
    return trajectory(workdir)


def test_stopped_and_killed_and_still_equal_to_one_process(tmp_path):
    workdir, reference = tmp_path / "run", tmp_path / "alone"
    alone(reference)
    until_kill = kill_one(workdir, stop_one(workdir) + 2)
    main, other = map(finish, launch_two(workdir))
    assert "validation loss" in main and not spoke(other)
    rows = trajectory(workdir)
    assert rows[: len(until_kill)] == until_kill  # steps after the checkpoint were made again: the same bits
    for two, one in zip(rows, trajectory(reference), strict=True):
        assert two == pytest.approx(one, rel=5e-6)  # sums over devices are made in another order
    for name in ("expert_load.jsonl", "samples.json", "tokenizer.json", "config.json"):
        assert (workdir / name).read_text() == (reference / name).read_text(), name
    positions = [json.loads((w / "checkpoints/8/run/metadata").read_text())["data"] for w in (workdir, reference)]
    assert positions[0] == positions[1]


def test_what_one_process_finds_ends_both(tmp_path):
    """Only process 0 trains the tokenizer, so only it sees that the vocabulary is too small."""
    main, other = (finish(process, status=2) for process in launch_two(tmp_path / "run", "--config.model.vocab_size=100"))
    assert main == "error: config.model.vocab_size = 100: must be at least 261: all bytes and the control tokens\n"
    assert other == ""
    assert not (tmp_path / "run").exists()
