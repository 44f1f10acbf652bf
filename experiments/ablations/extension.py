"""A phase of context extension, as a configuration (V3 sec. 4.3)."""

import math

from dsv3_jax.config import Config, RopeScaling
from experiments.ablations import study


def extended(config: Config, kind: str, factor: int, steps: int) -> Config:
    """A phase on rows `factor` times as long and as many tokens a step, or one row, at the last rates of the training before it."""
    length, rows = factor * config.train.sequence_length, max(1, config.train.batch_size // factor)
    micro = math.gcd(rows, config.train.micro_batch_size)
    scaling = RopeScaling(kind, float(factor), config.train.sequence_length)
    schedule = {"warmup_tokens": 0.0, "constant_tokens": float(steps * rows * length)}
    batch = {"sequence_length": length, "micro_batch_size": micro, "batch_size": rows, "batch_size_start": rows, "batch_ramp_tokens": 0.0}
    late = {"bias_update_speed": 0.0, "mtp_loss_weight": config.train.mtp_loss_weight_late}
    return study.changed(
        config,
        model={"rope_scaling": scaling, "max_position_embeddings": max(length, config.model.max_position_embeddings)},
        optimizer={"peak_lr": config.optimizer.final_lr, **schedule},
        train={"steps": steps, **batch, **late},
        data={"num_shards": math.gcd(micro, config.data.num_shards)},
    )
