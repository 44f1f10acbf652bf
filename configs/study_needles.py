"""A third of a million parameters and rows of 64 tokens: on two CPU cores it learns in a minute or two to look up what a text said before.

uv run -m experiments.ablations.long_context --config=configs/study_needles.py --workdir=runs/long_context
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.model.update(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=192,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.05,
    )
    config.data.fim_rate = 0.0  # a middle at the end would put repeats before what they repeat
    config.train.update(
        steps=1500, sequence_length=64, micro_batch_size=32, batch_size=32, batch_size_start=32, ema_decay=0.0, eval_sequences=128
    )
    return config
