"""A DeepSeek-V3 in miniature, every architectural part on, for two CPU cores.

uv run -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config, schedule_by_shares


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        initializer_range=0.02,
        max_position_embeddings=512,
    )
    config.train.update(
        steps=280,
        sequence_length=256,
        micro_batch_size=8,
        batch_size=8,
        batch_size_start=8,
        compute_dtype="float32",
        remat="none",
        ema_decay=0.98,
        bias_update_speed=0.01,
        eval_every=70,
        eval_sequences=64,
    )
    config.optimizer.update(peak_lr=3e-3, final_lr=3e-4, tail_lr=1e-4)
    schedule_by_shares(config)
    config.checkpoint.update(every=70, keep=2)
    return config
