"""Every configuration file is usable, and v3_671b is the recipe of the report (V3 sec. 4.2)."""

import functools
import importlib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dsv3_jax.config import Config, from_config_dict
from dsv3_jax.training.accounting import tokens_of_run
from dsv3_jax.training.schedule import batch_size, bias_update_speed, learning_rate, mtp_loss_weight, plan_step

NAMES = sorted(path.stem for path in Path(__file__).parents[1].joinpath("configs").glob("*.py") if path.stem != "__init__")
T = 1e12


def load(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


@functools.cache
def frozen(name: str) -> Config:
    return from_config_dict(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_phases_follow_each_other_and_end_inside_the_run(name: str):
    config = frozen(name)
    o, t, tokens = config.optimizer, config.train, tokens_of_run(config.train)
    ends = [o.warmup_tokens, o.constant_tokens, o.constant_tokens + o.cosine_tokens, o.constant_tokens + o.cosine_tokens + o.tail_tokens]
    assert 0 < ends[0] < ends[1] < ends[2] < ends[3] < tokens
    assert t.batch_ramp_tokens < tokens
    assert t.mtp_switch_tokens is not None and t.mtp_switch_tokens < tokens
    assert t.bias_update_tokens is not None and t.bias_update_tokens < tokens
    assert o.peak_lr > o.final_lr > o.tail_lr > 0


@pytest.mark.parametrize("name", ["tiny", "study_cpu", "colab", "h200", "study_120m"])
@pytest.mark.parametrize("changed", ["steps", "batch_size"])
def test_phases_scale_with_the_length_of_a_run(name: str, changed: str):
    config = load(name)
    before = from_config_dict(config)
    config.train[changed] *= 2
    after = from_config_dict(config)
    for field in ("warmup_tokens", "constant_tokens", "cosine_tokens", "tail_tokens"):
        assert getattr(after.optimizer, field) == 2 * getattr(before.optimizer, field)
    assert after.train.mtp_switch_tokens == 2 * before.train.mtp_switch_tokens
    assert after.train.bias_update_tokens == 2 * before.train.bias_update_tokens


@pytest.mark.parametrize(("name", "tokens"), [("v3_671b", 14.8e12), ("ablation_16b", 1.33e12), ("ablation_230b", 0.9e12)])
def test_steps_are_the_fewest_that_see_all_tokens(name: str, tokens: float):
    config = frozen(name)
    last_step = config.train.batch_size * config.train.sequence_length
    assert 0 <= tokens_of_run(config.train) - tokens < last_step


def test_tokens_of_a_run_are_what_the_steps_of_training_add_up_to():
    config, tokens = frozen("v3_671b"), 0
    for _ in range(15155):  # the ramp, as the configuration's comment says
        assert tokens < config.train.batch_ramp_tokens
        tokens = plan_step(tokens, config).tokens
    assert tokens >= config.train.batch_ramp_tokens
    assert tokens_of_run(config.train) == tokens + 227785 * 15360 * 4096


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (1000 * 3072 * 4096, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),
        (10 * T, 2.2e-4),
        (12.15 * T, (2.2e-4 + 2.2e-5) / 2),
        (14.3 * T, 2.2e-5),
        (14.632 * T, 2.2e-5),
        (14.6331 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_v3_learning_rate(tokens: float, rate: float):
    assert learning_rate(tokens, frozen("v3_671b").optimizer) == pytest.approx(rate, rel=1e-9)


def test_v3_learning_rate_falls_along_a_cosine_after_the_constant_phase():
    optimizer = frozen("v3_671b").optimizer
    assert learning_rate(10.1 * T, optimizer) < 2.2e-4
    assert learning_rate(11.075 * T, optimizer) == pytest.approx(2.2e-5 + 1.98e-4 * (0.5 + 0.5 * 2**-0.5))


@pytest.mark.parametrize(("tokens", "size"), [(0, 3072), (0.2345 * T, 9216), (0.469 * T, 15360), (14 * T, 15360)])
def test_v3_batch_size(tokens: float, size: int):
    assert batch_size(tokens, frozen("v3_671b").train) == size


def test_v3_switches_and_precision():
    config = frozen("v3_671b")
    train = config.train
    assert [bias_update_speed(tokens, train) for tokens in (0, 14.3 * T, 14.31 * T, 14.8 * T)] == [1e-3, 1e-3, 0, 0]
    assert [mtp_loss_weight(tokens, train) for tokens in (0, 10 * T, 10.01 * T, 14.8 * T)] == [0.3, 0.3, 0.1, 0.1]
    assert (train.compute_dtype, train.remat, config.optimizer.moment_dtype) == ("bfloat16", "selective", "bfloat16")
    assert config.data.fim_rate == 0.1 and config.model.rope_scaling.type == "none" and train.ema_decay > 0


def test_h200_dimensions_fit_fp8_tiles():
    m = frozen("h200").model
    heads = m.num_attention_heads
    widths = [m.vocab_size, m.hidden_size, m.intermediate_size, m.moe_intermediate_size, m.q_lora_rank, m.kv_lora_rank]
    widths += [heads * m.qk_head_dim, heads * m.v_head_dim, heads * (m.qk_nope_head_dim + m.v_head_dim)]
    assert all(width % 128 == 0 for width in widths)
