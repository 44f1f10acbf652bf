"""A run on a pipeline: its checkpoints move to other meshes and back, and the command trains, stops and goes on."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import Config, MeshConfig, ParallelConfig, from_config_dict
from dsv3_jax.training.trainer import Trainer
from tests import micro_config
from tests.training.test_resume import finish, launch, trajectory

BATCH = (
    "--config.train.batch_size=8",
    "--config.train.batch_size_start=4",
    "--config.train.steps=4",
    "--config.checkpoint.every=2",
    "--config.model.num_nextn_predict_layers=0",
)
PIPELINE = (*BATCH, "--host_devices=4", "--config.parallel.mesh.pipe=2", "--config.parallel.mesh.gpu=2")


def on(pipe: int, gpu: int) -> Config:
    config = from_config_dict(micro_config.get_config())
    train = dataclasses.replace(config.train, batch_size=8)
    return dataclasses.replace(config, train=train, parallel=ParallelConfig(MeshConfig(pipe=pipe, gpu=gpu)))


def test_a_checkpoint_moves_between_meshes_bit_for_bit(tmp_path):
    first = Trainer(on(pipe=1, gpu=1), tmp_path / "run")
    first.progress.step = 1
    first.save()
    expected = jax.device_get(first.state)
    first.close()
    for step, (pipe, gpu) in enumerate([(2, 2), (1, 2), (2, 1)], start=2):
        trainer = Trainer(on(pipe, gpu), tmp_path / "run")
        assert trainer.progress.step == step - 1
        embed = trainer.state.params["embed"]
        assert embed.addressable_shards[0].data.size * pipe * gpu == embed.size  # masters are cut along pipe too
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.state), expected)
        trainer.progress.step = step
        trainer.save()
        trainer.close()


@pytest.mark.slow
def test_the_command_trains_on_a_pipeline_and_goes_on_without_it(tmp_path):
    """Two steps on a pipeline of two ranks, two more on one device: as four steps on one device."""
    finish(launch(tmp_path / "one", *BATCH))
    finish(launch(tmp_path / "run", *PIPELINE, "--config.train.steps=2"))
    output = finish(launch(tmp_path / "run", *BATCH))
    assert "continuing after step 2" in output
    for got, expected in zip(trajectory(tmp_path / "run"), trajectory(tmp_path / "one"), strict=True):
        assert got["batch_size"] == expected["batch_size"]
        for name in ("loss", "balance_loss", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-3), name
