"""A DeepSeek-V3 of 81M parameters (25M activated) for one GPU of 16 GB, such as Colab's T4.

uv run -m experiments.pretrain --config=configs/colab.py --workdir=runs/colab

25M tokens of Python's standard library. Everything is float32, because a T4 has no bf16; on an L4 or A100 add
--config.train.compute_dtype=bfloat16. By experiments.describe it holds about 6 GiB. Not run on a T4 yet.
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config, schedule_by_shares


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        initializer_range=0.02,
        max_position_embeddings=1024,
    )
    config.train.update(
        steps=1500,
        sequence_length=1024,
        micro_batch_size=16,
        batch_size=16,
        batch_size_start=16,
        compute_dtype="float32",
        remat="selective",
        ema_decay=0.0,  # on a fast GPU the copy to the host would take longer than a step
        bias_update_speed=3e-3,
    )
    config.optimizer.update(peak_lr=1e-3, final_lr=1e-4, tail_lr=3e-5)
    schedule_by_shares(config)
    config.checkpoint.update(every=100, keep=2)
    return config
