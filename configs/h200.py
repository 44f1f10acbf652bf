"""A DeepSeek-V3 in proportion, 2.6B parameters and 0.7B activated, for one H200 (141 GB) at sequence 4096.

uv run -m experiments.pretrain --config=configs/h200.py --workdir=runs/h200 --config.data.source='jsonl:corpus/*.jsonl#text'

0.5B tokens in steps of 262 thousand. Without a source it reads Python's standard library, which is enough to
measure speed and too little to learn from. By experiments.describe it holds about 65 GiB. A step of one
of its 8 micro-batches takes 0.44 s with --config.precision.policy=fp8, 0.49 s in bf16 (docs/benchmarks.md). No run went to its end yet.
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config, schedule_by_shares


def get_config() -> ConfigDict:
    config = default_config()
    # Every dimension is a multiple of 128, so that FP8 tiles fit, but kv_lora_rank + qk_rope_head_dim = 576, V3's own.
    config.model.update(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=5120,
        moe_intermediate_size=512,
        num_hidden_layers=12,
        first_k_dense_replace=1,
        num_attention_heads=32,
        q_lora_rank=512,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        max_position_embeddings=4096,
    )
    config.train.update(
        steps=2000,
        sequence_length=4096,
        micro_batch_size=8,
        batch_size=64,
        batch_size_start=64,
        ema_decay=0.0,  # an average of 2.9B parameters costs the host 11 GB, and much CPU time every step
        eval_every=200,
    )
    config.optimizer.update(peak_lr=4.2e-4, final_lr=4.2e-5, tail_lr=1.4e-5)
    schedule_by_shares(config, constant=0.67, cosine=0.29, tail=0.025, mtp=0.67, bias=0.96)
    config.checkpoint.update(every=200, keep=2)
    return config
