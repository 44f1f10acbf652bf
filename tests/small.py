"""A model small enough to compile in a second or two, with every part on."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.model.init import init_params
from dsv3_jax.model.transformer import RouterBias

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
TRAIN = TrainConfig(sequence_length=16, micro_batch_size=8, batch_size=8, batch_size_start=8, compute_dtype="float32", remat="none")
CONFIG = Config(model=MODEL, train=TRAIN, optimizer=OptimizerConfig(peak_lr=1e-2))


def model(**changes: Any) -> ModelConfig:
    """MODEL with some fields changed."""
    return dataclasses.replace(MODEL, **changes)


@functools.cache
def parameters(config: ModelConfig, seed: int = 0) -> tuple[dict, RouterBias]:
    """Random parameters and a random router bias, some of it strongly negative."""
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    e = config.n_routed_experts
    bias = RouterBias(*(rng.normal(-0.5, 0.5, (n, e)).astype(np.float32) for n in (config.num_moe_layers, config.num_nextn_predict_layers)))
    return params, jax.tree.map(jax.numpy.asarray, bias)


@functools.cache
def agreeing(config: ModelConfig, seed: int = 0) -> tuple[dict, RouterBias]:
    """Parameters whose modules often draft what the main model would say: embedding and head outweigh the layers."""
    params, bias = parameters(config, seed)
    eh_proj = params["mtp"]["eh_proj"]["kernel"].at[:, : config.hidden_size].add(2 * np.eye(config.hidden_size))
    mtp = {**params["mtp"], "eh_proj": {"kernel": eh_proj}}
    return {**params, "embed": params["embed"] * 6, "lm_head": params["lm_head"] * 3, "mtp": mtp}, bias


def rows(config: ModelConfig, batch: int, length: int, seed: int = 1) -> jax.Array:
    """Random rows of length + 1 tokens."""
    return jax.random.randint(jax.random.key(seed), (batch, length + 1), 0, config.vocab_size)
