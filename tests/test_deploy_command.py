"""The command that compiles prefill and decoding of a deployment unit without its devices."""

import json
from pathlib import Path

import pytest

from tests.test_cli import assert_refused, run

MICRO = ("bench.deploy", "--config=tests/micro_config.py")


@pytest.mark.slow
def test_both_programs_are_compiled_and_send_what_the_mesh_makes_them(tmp_path: Path):
    done = run(*MICRO, "--node=2", "--tensor=2", "--context=16", "--micro_batches=1", f"--json={tmp_path}/unit.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "unit.json").read_text())
    # A group gathers compressed queries (12) and latents (8 + 4), in float32: of half a prompt each, and of one sequence each.
    layers, numbers = 2, 12 + 8 + 4
    for name, tokens in (("prefill", 8), ("decode", 1)):
        assert report[name]["sent_bytes"]["all-gather"] == {"tensor": layers * tokens * numbers * 4}
        assert report[name]["overlap"]["all"] == 6  # there with numbers, there with rows, back; two hops


def test_units_that_cannot_be_are_refused():
    assert_refused(run(*MICRO, "--tensor=4"), "tensor", "2 attention heads")
    assert_refused(run(*MICRO, "--target=missing.txt"), "--target", "missing.txt")
    assert_refused(run(*MICRO, "--config.train.compute_dtype=bfloat16"), "compute_dtype", "--target")
