"""The model of tests/small.py as a configuration file, on a few documents: a run of some seconds."""

import sysconfig

from ml_collections import ConfigDict

from dsv3_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=300, hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=2, first_k_dense_replace=1,
        num_attention_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    config.data.update(source=f"text:{sysconfig.get_path('stdlib')}/email/*.py", held_out=0.1, num_shards=2)
    config.train.update(
        steps=24, sequence_length=16, micro_batch_size=2, batch_size=4, batch_size_start=2, batch_ramp_tokens=320.0,
        compute_dtype="float32", remat="none", ema_decay=0.9, eval_every=9, eval_sequences=4,
    )  # fmt: skip
    config.optimizer.update(peak_lr=1e-2, warmup_tokens=100.0, constant_tokens=500.0, cosine_tokens=700.0)
    config.checkpoint.update(every=6, keep=3)
    return config
