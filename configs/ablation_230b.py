"""The large model of the report's ablations: DeepSeek-V2's shape, 236B parameters (V3 sec. 4.5, B.1).

uv run -m experiments.describe --config=configs/ablation_230b.py

The report compares MTP, balancing and FP8 on a model of 228.7B parameters, FP8 over 0.9T tokens, and gives
no shape. This one is DeepSeek-V2 (2405.04434, sec. 3.1), 3 % larger, with V3's routing; learning rate and
batch are V2's. Not run here: it needs a cluster, and weights that are spread over devices.
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config

TOKENS = 0.9e12
# What a trillion tokens of V3's 14.8T is in this run: phases keep the shares that they have there.
TRILLION = TOKENS / 14.8


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        first_k_dense_replace=1,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        n_shared_experts=2,
        n_routed_experts=160,
        num_experts_per_tok=6,
        # V2's node limit: 8 groups, experts from at most 3. A group scores the sum of its best 6 / 3 = 2, as in V3.
        n_group=8,
        topk_group=3,
    )
    config.optimizer.update(
        peak_lr=2.4e-4,
        final_lr=2.4e-5,
        tail_lr=8e-6,
        warmup_tokens=2000.0 * 2304 * 4096,
        constant_tokens=10 * TRILLION,
        cosine_tokens=4.3 * TRILLION,
        tail_tokens=0.333 * TRILLION,
    )
    config.train.update(
        steps=24424,  # 0.9T tokens: 1244 steps until the ramp ends, then 23180 of 9216 * 4096
        micro_batch_size=128,
        batch_size_start=2304,
        batch_size=9216,
        batch_ramp_tokens=TOKENS * 225 / 8100,  # V2: the first 225B of 8.1T tokens
        mtp_switch_tokens=10 * TRILLION,
        bias_update_tokens=14.3 * TRILLION,
        ema_decay=0.999,
    )
    config.data.num_shards = 128
    config.parallel.mesh.data = 128
    return config
