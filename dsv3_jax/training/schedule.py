"""Schedules of a run, as plain functions of tokens seen (V3 sec. 4.2). They run on the host, in Python numbers.

Counting tokens and not steps keeps every schedule where it belongs when the batch size changes.
"""

import math
from typing import NamedTuple

from dsv3_jax.config import Config, OptimizerConfig, TrainConfig


def learning_rate(tokens: float | int, optimizer: OptimizerConfig) -> float:
    """Linear warm-up from 0, constant, cosine to `final_lr`, then two constant tails."""
    o = optimizer
    if tokens < o.warmup_tokens:
        return o.peak_lr * tokens / o.warmup_tokens
    if tokens <= o.constant_tokens:
        return o.peak_lr
    since = tokens - max(o.constant_tokens, o.warmup_tokens)
    if since < o.cosine_tokens:
        return o.final_lr + (o.peak_lr - o.final_lr) * 0.5 * (1.0 + math.cos(math.pi * since / o.cosine_tokens))
    return o.final_lr if since < o.cosine_tokens + o.tail_tokens else o.tail_lr


def batch_size(tokens: float | int, train: TrainConfig) -> int:
    """Sequences of the next step: linear from `batch_size_start` to `batch_size`, in whole micro-batches."""
    if tokens >= train.batch_ramp_tokens:
        return train.batch_size
    grown = train.batch_size_start + (train.batch_size - train.batch_size_start) * tokens / train.batch_ramp_tokens
    return int(grown) // train.micro_batch_size * train.micro_batch_size


def bias_update_speed(tokens: float | int, train: TrainConfig) -> float:
    """gamma of loss-free balancing; 0 for the last tokens and for strategies without a bias."""
    ended = train.bias_update_tokens is not None and tokens > train.bias_update_tokens
    return train.bias_update_speed if train.balance == "loss_free" and not ended else 0.0


def mtp_loss_weight(tokens: float | int, train: TrainConfig) -> float:
    """lambda of the MTP loss."""
    switched = train.mtp_switch_tokens is not None and tokens > train.mtp_switch_tokens
    return train.mtp_loss_weight_late if switched else train.mtp_loss_weight


class StepPlan(NamedTuple):
    """What the schedules ask of one step."""

    batch_size: int
    tokens: int  # seen once the step is done
    learning_rate: float
    bias_update_speed: float
    mtp_loss_weight: float


def plan_step(tokens_seen: int, config: Config) -> StepPlan:
    """The step that follows `tokens_seen` tokens. Its rates are those at its end, so that warm-up does not waste a step at 0."""
    size = batch_size(tokens_seen, config.train)
    tokens = tokens_seen + size * config.train.sequence_length
    return StepPlan(
        size,
        tokens,
        learning_rate(tokens, config.optimizer),
        bias_update_speed(tokens, config.train),
        mtp_loss_weight(tokens, config.train),
    )
