"""About 120M parameters for studies on one GPU: every architectural part on, bf16.

uv run -m experiments.ablations.fp8_vs_bf16 --config=configs/study_120m.py --steps=2000 --workdir=runs/fp8-gpu
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config, schedule_by_shares


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=8192,
        hidden_size=640,
        intermediate_size=1792,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=24,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        initializer_range=0.02,
        max_position_embeddings=1024,
    )
    config.train.update(
        steps=2000, sequence_length=1024, micro_batch_size=8, batch_size=8, batch_size_start=8, remat="selective", bias_update_speed=3e-3
    )
    config.optimizer.update(peak_lr=1e-3, final_lr=1e-4, tail_lr=3e-5)
    schedule_by_shares(config)
    return config
