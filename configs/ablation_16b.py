"""The small model of the report's ablations: 15.7B parameters, 2.7B activated (V3 sec. 4.5, B.1).

uv run -m experiments.describe --config=configs/ablation_16b.py

The report compares MTP, the balancing strategies and FP8 on it, over 1.33T tokens. Not run here: it needs a
cluster, and weights that are spread over devices. The report gives its size only; the shape is that of
DeepSeek-V2-Lite (2405.04434, appendix B) with V3's routing, and so are learning rate and batch.
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config

TOKENS = 1.33e12
# What a trillion tokens of V3's 14.8T is in this run: phases keep the shares that they have there.
TRILLION = TOKENS / 14.8


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        num_attention_heads=16,
        kv_lora_rank=512,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        # Ungrouped, as in V2-Lite: groups keep a token on few nodes, and all experts of this model fit on one.
        n_group=1,
        topk_group=1,
    )
    config.model.q_lora_rank = None
    config.optimizer.update(
        peak_lr=4.2e-4,
        final_lr=4.2e-5,
        tail_lr=1.4e-5,
        warmup_tokens=2000.0 * 4608 * 4096,
        constant_tokens=10 * TRILLION,
        cosine_tokens=4.3 * TRILLION,
        tail_tokens=0.333 * TRILLION,
    )
    config.train.update(
        steps=70466,  # 1.33T / (4608 * 4096)
        micro_batch_size=64,
        batch_size=4608,
        batch_size_start=4608,
        mtp_switch_tokens=10 * TRILLION,
        bias_update_tokens=14.3 * TRILLION,
        ema_decay=0.999,
    )
    config.data.num_shards = 64
    config.parallel.mesh.data = 64
    return config
