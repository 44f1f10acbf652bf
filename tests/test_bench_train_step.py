"""The benchmark of a training step asks a peer for its figures, and says what the peer said where it fails."""

import sys
from pathlib import Path

import pytest

from dsv3_jax.config import from_config_dict
from experiments.bench.peer import training_rates
from tests import micro_config
from tests.test_cli import assert_refused, run

# Stands for a Python with torch: says what it read of the configuration.
PEER = """#!{python}
import json, sys
print("a peer", flush=True)
config = json.loads(sys.stdin.readline())
assert config["model"]["hidden_size"] == {width}
figures = dict(tokens_per_second=config["train"]["sequence_length"], implementation=sys.argv[2], mtp=True)
print(json.dumps(dict(fastest=[figures])), flush=True)
"""
CONFIG = from_config_dict(micro_config.get_config())


def stand_in(folder: Path, width: int) -> str:
    path = folder / "peer"
    path.write_text(PEER.format(python=sys.executable, width=width))
    path.chmod(0o755)
    return str(path)


def test_a_peer_gets_the_configuration(tmp_path: Path):
    (figures,) = training_rates(stand_in(tmp_path, CONFIG.model.hidden_size), CONFIG)
    script = "experiments.bench.train_step_transformers"
    assert figures == {"tokens_per_second": CONFIG.train.sequence_length, "implementation": script, "mtp": True}


def test_a_peer_that_ends_instead_of_answering_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(RuntimeError, match=r"train_step_transformers ended with status 1; what it said is above"):
        training_rates(stand_in(tmp_path, 0), CONFIG)
    assert "AssertionError" in capfd.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed():
    assert_refused(
        run("bench.train_step", "--config=tests/micro_config.py", "--json=nowhere/x.json"), "--json", "there is no folder nowhere"
    )
