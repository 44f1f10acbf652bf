"""Every ablation runs once, as a user runs it, at a size that is only good for that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
MICRO = [
    "--config=tests/micro_config.py",
    "--config.data.held_out=0.2",
    "--config.model.num_hidden_layers=1",
    "--config.model.first_k_dense_replace=0",
    "--config.model.num_nextn_predict_layers=0",
    "--config.model.q_lora_rank=None",
    "--config.model.n_shared_experts=0",
    "--config.train.batch_size=2",
]
ONE_MODULE = ["--config.model.num_nextn_predict_layers=1"]
NEEDLES = ["--config.model.vocab_size=600", "--config.train.sequence_length=48", "--config.data.fim_rate=0", "--lengths=1"]


@pytest.mark.parametrize(
    ("name", "arguments", "figures"),
    [
        ("accumulation", ["--steps=1", "--rows=4", "--largest_k=512"], ("errors_percent",)),
        ("balancing", [*MICRO, "--steps=2", "--seeds=2", "--times=2", "--strategies=sequence_wise,loss_free"], ("last",)),
        ("fim", [*MICRO, "--config.train.sequence_length=48", "--steps=2", "--seeds=2", "--rates=0,0.5"], ("val_loss", "figures")),
        ("fp8_vs_bf16", [*MICRO, "--steps=2"], ("mean_error", "largest_error", "chance_mean")),
        ("kv_cache", [*MICRO, "--steps=2", "--seeds=2", "--groups=1"], ("bytes_per_token", "equal_groups", "val_loss")),
        ("long_context", [*MICRO, *NEEDLES, "--steps=2", "--seeds=2", "--extension_steps=1", "--trials=1"], ("found", "depths", "lengths")),
        ("mtp", [*MICRO, *ONE_MODULE, "--steps=2", "--seeds=2", "--drafts=1", "--prompts=1"], ("val_loss", "flops", "accepted", "speedup")),
        ("node_limit", [*MICRO, "--steps=2", "--seeds=2", "--limits=1", "--config.model.num_experts_per_tok=2"], ("bytes_a_token",)),
        ("quant_granularity", [*MICRO, "--steps=1", "--coarse=128x128"], ("val_loss", "errors")),
        ("specialization", [*MICRO, "--steps=2", "--seeds=2", "--domain_kib=128"], ("bits", "loads")),
        ("state_precision", [*MICRO, "--steps=2"], ("val_loss_difference",)),
    ],
)
def test_leaves_a_plot_a_table_and_a_verdict(name, arguments, figures, tmp_path):
    command = [sys.executable, "-m", f"experiments.ablations.{name}", f"--workdir={tmp_path}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["verdict"] in done.stdout and "ublished" in result["verdict"]
    assert all(figure in result for figure in figures)
    assert (tmp_path / "plot.png").stat().st_size > 5000 and "| --- |" in (tmp_path / "table.md").read_text()
