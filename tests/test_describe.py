"""The describe command: every configuration, the JSON beside the table, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import Config
from experiments.describe import describe, render, scaled
from experiments.output import gib, table
from tests.test_configs import NAMES, frozen

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "experiments.describe", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_described(name: str):
    report = describe(frozen(name))
    text = render(report)
    assert scaled(report["parameters"]["total"]) in text
    assert report["training_bytes_per_device"] == sum(v for k, v in report["memory_bytes_per_device"].items() if k != "cache")
    by_remat = report["activation_bytes_by_remat"]
    assert by_remat["full"] < by_remat["selective"] < by_remat["none"]


def test_v3_from_the_command_line(tmp_path: Path):
    done = run("--config=configs/v3_671b.py", "--tokens=1e12", "--batch=2", "--length=1000", f"--json={tmp_path / 'v3.json'}")
    assert done.returncode == 0 and done.stderr == ""
    for figure in ("671.03B", "37.55B", "11.61B", "180,000", "32,768"):
        assert figure in done.stdout
    numbers = json.loads((tmp_path / "v3.json").read_text())
    assert numbers["parameters"]["total"] == pytest.approx(671.03e9, abs=5e6)
    assert numbers["memory_bytes_per_device"]["cache"] == 2 * 1000 * 61 * 576 * 2
    assert numbers["h800"]["hours"] == pytest.approx(180e3)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--utilisation=1.5", ["--utilisation", "1.5", "at most 1"]),
        ("--tokens=0", ["--tokens", "above 0"]),
        ("--json=missing/out.json", ["--json", "missing"]),
        ("--json=configs", ["--json", "configs", "folder"]),
        ("--config.train.remat=half", ["config.train.remat", "half", "selective"]),
    ],
)
def test_refusals_are_one_line_and_status_2(argument: str, words: list[str]):
    done = run("--config=configs/tiny.py", argument)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(word in done.stderr for word in words)


def test_hours_follow_tokens_and_utilisation():
    half, full = (describe(frozen("tiny"), tokens=1e9, utilisation=u)["h800"]["hours"] for u in (0.25, 0.5))
    assert half == pytest.approx(2 * full)
    assert full == pytest.approx(1e9 * describe(frozen("tiny"))["flops_per_token"]["total"] / (989.5e12 * 0.5 * 3600))


def test_a_micro_batch_is_divided_over_the_devices_and_so_are_masters_but_not_what_a_step_computes_with():
    def spread(config: Config, data: int) -> dict[str, int]:
        parallel = dataclasses.replace(config.parallel, mesh=dataclasses.replace(config.parallel.mesh, data=data))
        return describe(dataclasses.replace(config, parallel=parallel))["memory_bytes_per_device"]

    one, eight = spread(frozen("h200"), 1), spread(frozen("h200"), 8)
    assert eight["activations"] * 8 == one["activations"]
    assert eight["master"] == pytest.approx(one["master"] / 8, rel=1e-3) and eight["gradients"] == one["gradients"]
    assert (one["gathered"], eight["gathered"]) == (0, one["master"])


def test_table_aligns_columns():
    assert table([("a", "b"), ("long", "1.00")], "<>") == "a        b\n----------\nlong  1.00"
    assert (scaled(671026404352), scaled(999), gib(3 * 2**29), gib(2**19)) == ("671.03B", "999", "1.50 GiB", "0.50 MiB")
