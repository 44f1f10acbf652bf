import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_cli import assert_refused, run

UNIT = ("--replicas=18", "--groups=4", "--nodes=2", "--gpus=6")


@pytest.fixture
def loads(tmp_path: Path) -> str:
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).lognormal(0, 1, (2, 12)))
    return f"--loads={tmp_path}/loads.npy"


def test_the_command_places_prints_and_draws(tmp_path: Path, loads: str):
    done = run("placement", loads, *UNIT, "--hosted=5", "--steps=2", f"--json={tmp_path}/placed.json", f"--figure={tmp_path}/drawn")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.png", "drawn.svg", "loads.npy", "placed.json"]
    assert "12 experts in 18 slots, 6 GPUs, 2 nodes: hierarchical" in done.stdout
    mean = [float(number) for number in done.stdout.splitlines()[-1].split()[1:]]
    assert len(mean) == 5 and mean[0] > mean[1] >= 1 and mean[2] >= mean[3] >= mean[4] >= 1
    placed = json.loads((tmp_path / "placed.json").read_text())
    assert np.array(placed["physical_to_logical"]).shape == (2, 18)
    assert (np.array(placed["replica_count"]).sum(1) == 18).all()
    again = run("placement", loads, *UNIT, f"--current={tmp_path}/placed.json", f"--figure={tmp_path}/drawn")
    assert again.returncode == 0 and again.stdout.splitlines()[-1].split()[-1] == "0.000", again.stderr


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file", "numpy.save"]),
        (b"not an array", ["cannot be read as loads"]),
        (b"PK\x03\x04 and no more", ["--loads", "cannot be read as loads"]),
        (np.ones(4), ["float64 [4]", "needs numbers [layers, experts]"]),
        (np.array([[1.0, np.nan]]), ["finite"]),
        (np.array([["a", "b"]]), ["needs numbers"]),
        (np.ones((1, 12)), ["replicas = 7", "fewer than the 12 experts"]),
    ],
    ids=["missing", "garbage", "half an archive", "flat", "nan", "text", "too few slots"],
)
def test_loads_that_cannot_be_used(tmp_path: Path, content, parts: list[str]):
    file = tmp_path / "loads.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    assert_refused(run("placement", f"--loads={file}", "--replicas=7", f"--figure={tmp_path}/drawn"), *parts)
    assert not list(tmp_path.glob("drawn*"))


def test_a_run_without_reports_is_refused(tmp_path: Path):
    file = tmp_path / "expert_load.jsonl"
    file.touch()
    assert_refused(run("placement", f"--loads={file}", f"--figure={tmp_path}/drawn"), f"--loads = '{file}'", "has no reports yet")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--spread=nan", ["--spread=nan", "finite"]),
        ("--spread=1000", ["--spread", "1000", "[0.0, 10.0]"]),
        ("--threshold=nan", ["--threshold=nan", "finite"]),
        ("--nodes=0", ["--nodes", "0", "positive"]),
        ("--gpus=0", ["--gpus", "0", "positive"]),
        ("--groups=0", ["--groups", "0", "positive"]),
        ("--replicas=0", ["--replicas", "0", "positive"]),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, loads: str, argument: str, parts: list[str]):
    flags = [flag for flag in UNIT if flag.split("=")[0] != argument.split("=")[0]]
    assert_refused(run("placement", loads, *flags, "--shared", "--hosted=5", argument, f"--figure={tmp_path}/drawn"), *parts)


def test_a_layer_without_load_counts_as_balanced(tmp_path: Path):
    load = np.random.default_rng(0).lognormal(0, 1, (2, 12))
    load[1] = 0
    np.save(tmp_path / "loads.npy", load)
    unit = (f"--loads={tmp_path}/loads.npy", *UNIT, f"--figure={tmp_path}/drawn")
    done = run("placement", *unit, "--hosted=5", "--steps=2", "--spread=10")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.splitlines()[-2].split() == ["1", *["1.000"] * 5]
