import dataclasses

import pytest

from dsv3_jax.config import OptimizerConfig, TrainConfig
from dsv3_jax.training.schedule import batch_size, bias_update_speed, learning_rate, mtp_loss_weight, plan_step
from tests.small import CONFIG

OPTIMIZER = OptimizerConfig(
    peak_lr=1.0, final_lr=0.1, tail_lr=0.01, warmup_tokens=100.0, constant_tokens=500.0, cosine_tokens=400.0, tail_tokens=50.0
)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (50, 0.5),
        (100, 1.0),
        (500, 1.0),
        (700, 0.55),
        (600, 0.1 + 0.9 * 0.5 * (1 + 2**-0.5)),
        (900, 0.1),
        (949, 0.1),
        (950, 0.01),
        (9999, 0.01),
    ],
)
def test_learning_rate_at_its_knees(tokens, expected):
    assert learning_rate(tokens, OPTIMIZER) == pytest.approx(expected)


def test_learning_rate_without_a_constant_phase_starts_its_cosine_after_warm_up():
    optimizer = dataclasses.replace(OPTIMIZER, constant_tokens=0.0)
    assert learning_rate(100, optimizer) == pytest.approx(1.0)
    assert learning_rate(300, optimizer) == pytest.approx(0.55)


def test_batch_grows_linearly_in_whole_micro_batches():
    train = TrainConfig(micro_batch_size=4, batch_size_start=8, batch_size=24, batch_ramp_tokens=1000.0)
    assert [batch_size(t, train) for t in (0, 249, 250, 500, 999, 1000, 10**6)] == [8, 8, 12, 16, 20, 24, 24]


def test_switches_are_counted_in_tokens():
    train = TrainConfig(
        bias_update_tokens=10.0, bias_update_speed=0.001, mtp_switch_tokens=20.0, mtp_loss_weight=0.3, mtp_loss_weight_late=0.1
    )
    assert [bias_update_speed(t, train) for t in (10, 11)] == [0.001, 0.0]
    assert [mtp_loss_weight(t, train) for t in (20, 21)] == [0.3, 0.1]
    assert bias_update_speed(1, dataclasses.replace(train, balance="auxiliary")) == 0.0
    assert mtp_loss_weight(10**18, TrainConfig()) == 0.3


def test_tokens_of_a_plan_follow_its_batch():
    train = dataclasses.replace(CONFIG.train, batch_size=16, batch_ramp_tokens=1e4)
    plan = plan_step(0, dataclasses.replace(CONFIG, train=train))
    assert (plan.batch_size, plan.tokens) == (8, 8 * 16)
