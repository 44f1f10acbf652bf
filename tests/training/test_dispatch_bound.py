"""A run whose dispatch buffers turn out too small: they grow, and the step is made again."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, ParallelConfig, from_config_dict
from dsv3_jax.training.trainer import Trainer
from tests import micro_config


@pytest.fixture
def two_steps(tmp_path, monkeypatch):
    """Metrics of two compiled steps with a bound, and the trainer after them."""
    lines = []
    monkeypatch.setattr("dsv3_jax.training.trainer._log.warning", lambda text, *values: lines.append(text % values))

    def train(bound):
        config = from_config_dict(micro_config.get_config())
        model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
        parallel = ParallelConfig(MeshConfig(gpu=2), dispatch_bound=bound)
        trainer = Trainer(dataclasses.replace(config, model=model, parallel=parallel), tmp_path / str(bound))
        trainer.compile()
        metrics = jax.device_get([trainer.advance().metrics for _ in range(2)])
        trainer.close()
        return metrics, trainer, lines

    return train


def test_a_buffer_grows_until_the_step_fits(two_steps):
    expected, _, lines = two_steps(None)
    assert not lines
    got, trainer, lines = two_steps(1.0)
    assert lines and all("made again with parallel.dispatch_bound = 2" in line for line in lines)
    assert trainer.config.parallel.dispatch_bound == 2
    assert isinstance(trainer.train_step, jax.stages.Compiled)  # benchmarks read its memory plan and its schedule
    assert trainer.progress.step == 2
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.main.nll, b.main.nll, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-4)
