"""DeepSeek-V3 itself: 671B parameters, 37B activated, and the whole pre-training recipe (V3 sec. 4.2).

uv run -m experiments.describe --config=configs/v3_671b.py

The report trained it on 2048 H800 in 2664 thousand GPU hours, about 54 days. Not trained here. `describe` counts it,
experiments.bench.compile compiles its step for any mesh, and docs/cluster.md has the command for 2048 GPUs. Real text
and a tokenizer come with --config.data.source and --config.data.tokenizer. Every value of the recipe is written out,
also where it is the default.
"""

from ml_collections import ConfigDict

from dsv3_jax.config import default_config

TRILLION = 1e12


def get_config() -> ConfigDict:
    config = default_config()
    # The public config.json, with the report's initializer_range and aux_loss_alpha where the two differ.
    config.model.update(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        num_nextn_predict_layers=1,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_shared_experts=1,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        aux_loss_alpha=1e-4,
        rms_norm_eps=1e-6,
        initializer_range=0.006,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_interleave=True,
    )
    config.model.rope_scaling.type = "none"  # YaRN comes with the context extension (sec. 4.3)
    config.data.update(fim_rate=0.1, document_mask=False, num_shards=128)
    config.optimizer.update(
        peak_lr=2.2e-4,
        final_lr=2.2e-5,
        tail_lr=7.3e-6,
        # 2000 steps of the first batch size. The batch grows meanwhile, so the run is through after 1846.
        warmup_tokens=2000.0 * 3072 * 4096,
        constant_tokens=10 * TRILLION,
        cosine_tokens=4.3 * TRILLION,
        tail_tokens=0.333 * TRILLION,  # the last 167B tokens have tail_lr
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        moment_dtype="bfloat16",
    )
    config.train.update(
        steps=242940,  # 14.8T tokens: 15155 steps until the ramp ends at 469B, then 227785 of 15360 * 4096
        sequence_length=4096,
        micro_batch_size=128,  # one sequence on each of the 2048 / 16 ranks that share the batch
        batch_size_start=3072,
        batch_size=15360,
        batch_ramp_tokens=0.469 * TRILLION,
        compute_dtype="bfloat16",
        remat="selective",
        balance="loss_free",
        bias_update_speed=1e-3,
        bias_update_tokens=14.3 * TRILLION,
        mtp_loss_weight=0.3,
        mtp_loss_weight_late=0.1,
        mtp_switch_tokens=10 * TRILLION,
        ema_decay=0.999,  # the report keeps an average and does not say how long
    )
    config.parallel.mesh.data = 128
    return config
