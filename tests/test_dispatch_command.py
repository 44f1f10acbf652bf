"""Traffic of dispatch: rows from the plans, bytes from the compiled program, picks of a model, and the command."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, ParallelConfig
from dsv3_jax.model.picks import picked_experts
from dsv3_jax.model.transformer import Execution, trunk
from dsv3_jax.parallel.expert import make_hops
from experiments.bench.traffic import compiled_bytes, nodes_a_token, random_picks, rows_sent
from tests import small
from tests.test_cli import assert_refused, run

NODES, GPUS = 2, 4
ROUTING = small.model(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, hidden_size=160)
MESH = MeshConfig(node=NODES, gpu=GPUS)


@pytest.mark.parametrize("mode", ["direct", "two_hop"])
def test_rows_are_those_that_tokens_need(mode):
    picks = np.asarray(random_picks(jax.random.key(0), 8 * 30, ROUTING)).reshape(8, 30, 4)
    needed = {"node": 0, "gpu": 0}
    for device, tokens in enumerate(picks):
        at = divmod(device, GPUS)
        for token in tokens:
            devices = {divmod(int(expert) // 2, GPUS) for expert in token}
            if mode == "direct":
                needed["node"] += sum(node != at[0] for node, _ in devices)
                needed["gpu"] += sum(node == at[0] and gpu != at[1] for node, gpu in devices)
            else:
                needed["node"] += len({node for node, _ in devices} - {at[0]})
                needed["gpu"] += sum(gpu != at[1] for _, gpu in devices)
    sent = rows_sent(picks, 16, make_hops(mode, MESH, ROUTING), MESH)
    assert sent == pytest.approx({axis: count / 240 for axis, count in needed.items()})


def test_nodes_of_a_token():
    assert nodes_a_token(np.array([[0, 1, 2, 3], [0, 4, 8, 12]]), 16, 4) == 2.5


@pytest.mark.parametrize("bound", [None, 1.5])
def test_the_compiled_program_sends_the_blocks_of_the_plan(bound):
    train = dataclasses.replace(small.TRAIN, sequence_length=32)
    config = dataclasses.replace(small.CONFIG, model=ROUTING, train=train, parallel=ParallelConfig(MESH))
    for mode, precision in (("direct", "bf16"), ("two_hop", "fp8")):
        one = compiled_bytes(config, mode, precision == "fp8", bound, 32)
        assert one["compiled_bytes"] == pytest.approx(one["planned_bytes"])
        assert all(size > 0 for size in one["compiled_bytes"].values())


def test_picks_are_those_of_the_models_own_forward_pass():
    params, bias = small.parameters(small.MODEL)
    tokens = small.rows(small.MODEL, 2, 16)[:, :-1]
    arguments = (params, bias, tokens, small.MODEL, Execution())
    picks, load = picked_experts(*arguments), trunk(*arguments).load
    assert picks.shape == (2, 32, 4)
    for layer, expected in zip(np.asarray(picks), np.asarray(load), strict=True):
        np.testing.assert_array_equal(np.bincount(layer.ravel(), minlength=8), expected)


@pytest.mark.slow
def test_the_command_prices_random_and_trained_routers(tmp_path):
    config = "--config=tests/micro_config.py"
    assert run("pretrain", config, f"--workdir={tmp_path}/run", "--config.train.steps=6").returncode == 0
    mesh = ("--config.parallel.mesh.node=2", "--config.parallel.mesh.gpu=1")
    done = run("bench.dispatch", config, *mesh, f"--workdir={tmp_path}/run", f"--json={tmp_path}/x.json", f"--figure={tmp_path}/x.svg")
    assert done.returncode == 0, done.stderr
    assert "trained, MoE layer 0" in done.stdout and "at most 4" in done.stdout and (tmp_path / "x.svg").exists()
    report = json.loads((tmp_path / "x.json").read_text())
    rows = {one["dispatch"]: one["rows"]["node"] for one in report["routers"]["trained, MoE layer 0"]["sent"]}
    assert 0 < rows["two_hop"] == rows["direct"] <= 1  # a node is a device here
    refused = run("bench.dispatch", config, *mesh, f"--workdir={tmp_path}/run", "--config.model.topk_group=3")
    assert_refused(refused, "config.model.topk_group = 3", "has 2")


def test_one_device_has_nothing_to_send():
    assert_refused(run("bench.dispatch", "--config=tests/micro_config.py"), "config.parallel.mesh", "nothing is sent")
