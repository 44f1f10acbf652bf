"""About 1.7M parameters for studies on two CPU cores: `tiny` on short rows, with more and smaller experts and without MTP.

uv run -m experiments.ablations.balancing --config=configs/study_cpu.py --workdir=runs/balancing

Eight groups of four experts; a token's four may lie in any, because four groups are as many as they can need.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.model.update(
        num_hidden_layers=3,
        moe_intermediate_size=32,
        n_routed_experts=32,
        n_group=8,
        topk_group=4,
        num_nextn_predict_layers=0,
    )
    config.train.update(steps=150, sequence_length=128, ema_decay=0.0, eval_sequences=128)
    return config
