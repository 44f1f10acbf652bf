"""FLOPs of training, and the hours that they take.

They follow the usual convention for model FLOPs utilisation: multiplications and additions of matrix products, three times the
forward pass for a training step, and nothing for what the backward pass computes again.
"""

from typing import NamedTuple

from dsv3_jax.config import Config, ModelConfig, TrainConfig
from dsv3_jax.training.accounting.parameters import parameter_parts
from dsv3_jax.training.schedule import batch_size

H800_PEAK = 989.5e12  # FLOP/s of dense BF16 products; FP8 reaches twice that
PUBLISHED_HOURS_PER_TRILLION = 180e3  # H800 hours that a trillion tokens of V3's pre-training took (V3 sec. 1)


class Flops(NamedTuple):
    """Training FLOPs of a token, forward and backward."""

    products: int  # parameters of the main model
    attention: int  # scores and weighted values of the main model
    mtp_products: int
    mtp_attention: int

    @property
    def total(self) -> int:
        return sum(self)


def training_flops(model: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs of training on one token of a row of T = `sequence_length`, averaged over the row.

    Products: a parameter costs a multiplication and an addition in each of Fprop, Dgrad and Wgrad, so 6 for
    each that a token is multiplied by. The head counts once for the main model and once for each MTP module,
    the embedding, which is looked up, and the norms not at all. Attention: token i sees i tokens, on average
    (T + 1) / 2, and 2 (qk_head_dim + v_head_dim) FLOPs a head go forward for each; three times that in all.
    The last tokens of a row, for which MTP has no target, are counted like the others.
    """
    head, depth = model.hidden_size * model.vocab_size, model.num_nextn_predict_layers
    multiplied = [part for part in parameter_parts(model) if part.name not in ("embedding", "output head", "norms")]
    main = sum(part.activated for part in multiplied if part.section != "mtp")
    mtp = sum(part.activated for part in multiplied if part.section == "mtp")
    attention = 3 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * (sequence_length + 1)
    return Flops(6 * (main + head), model.num_hidden_layers * attention, 6 * (mtp + depth * head), depth * attention)


def model_flops_per_token(config: Config) -> int:
    """Training FLOPs of a token, MTP included: the numerator of model FLOPs utilisation."""
    return training_flops(config.model, config.train.sequence_length).total


def tokens_of_run(train: TrainConfig) -> int:
    """Tokens of `train.steps` steps, batch ramp included."""
    tokens = 0
    for step in range(train.steps):
        if tokens >= train.batch_ramp_tokens:
            return tokens + (train.steps - step) * train.batch_size * train.sequence_length
        tokens += batch_size(tokens, train) * train.sequence_length
    return tokens


def h800_hours(tokens: float | int, flops_per_token: int, utilisation: float) -> float:
    """GPU hours of training on H800s that reach the share `utilisation` of their BF16 peak."""
    return tokens * flops_per_token / (H800_PEAK * utilisation) / 3600


def published_utilisation() -> float:
    """Share of the BF16 peak that V3's 180 thousand hours a trillion tokens stand for, by this file's FLOPs."""
    return h800_hours(1e12, training_flops(ModelConfig(), 4096).total, 1.0) / PUBLISHED_HOURS_PER_TRILLION
