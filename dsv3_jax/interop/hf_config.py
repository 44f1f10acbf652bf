"""The config.json of a public checkpoint: read strictly into `ModelConfig`, and written back.

Readers of this file disagree about fields they do not know. Here a field that could change what the model
computes and is not implemented is an error that names it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dsv3_jax.config import ConfigError, ModelConfig, RopeScaling, default_config, from_config_dict

# Both readers of the public layout add up the best two experts of a group, whatever K and M are.
_GROUP_TOP_K = 2

_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "first_k_dense_replace",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
# Fields that a config.json may leave out, with what their absence means to its readers.
_OPTIONAL = {
    "num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "tie_word_embeddings": False, "rope_interleave": True,
    "aux_loss_alpha": ModelConfig.aux_loss_alpha, "initializer_range": ModelConfig.initializer_range,
}  # fmt: skip
# Fields with one value that this implementation computes.
_FIXED = {
    "model_type": "deepseek_v3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "moe_layer_freq": 1, "topk_method": "noaux_tc",
}  # fmt: skip
# Fields about storage, tokens or a framework, which do not change what the model computes.
_UNUSED = frozenset((
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version",
    "use_cache", "quantization_config", "ep_size", "pretraining_tp", "seq_aux", "head_dim", "qk_head_dim", "output_router_logits",
    "_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict",
))  # fmt: skip
_ROPE_FIELDS = ("rope_scaling", "rope_theta", "rope_parameters")
_ROPE_TYPES = {"default": "none", "linear": "linear", "yarn": "yarn"}


def model_config_from_hf(config_json: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a public config.json describes.

    Takes the release's layout (`rope_scaling`, `rope_theta`) and that of transformers 5 (`rope_parameters`).
    Raises ConfigError for a field that is missing, unknown, or has a value that cannot be honoured.
    """
    _check_fields(config_json)
    run = default_config()
    run.model = ConfigDict({
        **{name: config_json[name] for name in _REQUIRED},
        **{name: config_json.get(name, default) for name, default in _OPTIONAL.items()},
        **_rope_fields(config_json),
        "group_top_k": _group_top_k(config_json),
    })  # fmt: skip
    run.train.sequence_length = run.model.max_position_embeddings
    return from_config_dict(run).model


def _group_top_k(config_json: Mapping[str, Any]) -> int | None:
    """None where the paper's K / M is what public readers compute anyway."""
    per_group = config_json["num_experts_per_tok"] // max(config_json["topk_group"], 1)
    limited = config_json["n_group"] > config_json["topk_group"]
    return _GROUP_TOP_K if limited and per_group != _GROUP_TOP_K else None


def _check_fields(config_json: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if name not in config_json:
            raise ConfigError(name, None, "is missing from config.json")
    fixed = {**_FIXED, "num_key_value_heads": config_json["num_attention_heads"]}
    _check_quantization(config_json.get("quantization_config"))
    known = {*_REQUIRED, *_OPTIONAL, *_ROPE_FIELDS, *_UNUSED, *fixed}
    for name, value in config_json.items():
        if name not in known:
            raise ConfigError(name, value, "this field of config.json is not known here; remove it if the model does not depend on it")
        if name in fixed and value != fixed[name]:
            raise ConfigError(name, value, f"only {fixed[name]!r} is implemented")


def _check_quantization(section: Mapping[str, Any] | None) -> None:
    """FP8 is recognised by the tensors; what this section says must not contradict how they are read."""
    for name, value in (section or {}).items():
        allowed = {"quant_method": ("fp8",), "fmt": ("e4m3",), "weight_block_size": ([128, 128], (128, 128))}.get(name, (value,))
        if value not in allowed:
            raise ConfigError(f"quantization_config.{name}", value, f"only {allowed[0]!r} is implemented")


def _rope_fields(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of our model section, from either layout."""
    if config_json.get("rope_parameters") and config_json.get("rope_scaling"):
        raise ConfigError("rope_parameters", config_json["rope_parameters"], "rope_scaling says the same again; keep one of them")
    section = "rope_parameters" if config_json.get("rope_parameters") else "rope_scaling"
    given = {name: value for name, value in (config_json.get(section) or {}).items() if value is not None}
    theta = given.pop("rope_theta", config_json.get("rope_theta", ModelConfig.rope_theta))
    kinds = {given.pop(name) for name in ("type", "rope_type") if name in given}
    if len(kinds) > 1 or not kinds <= set(_ROPE_TYPES):
        raise ConfigError(f"{section}.type", config_json[section], f"must be one of {', '.join(_ROPE_TYPES)}")
    kind = _ROPE_TYPES[kinds.pop() if kinds else "default"]
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **_scaling_fields(section, kind, given)}}


def _scaling_fields(section: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    required = {"none": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}[kind]
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") if kind == "yarn" else ()
    for name in required:
        if name not in given:
            raise ConfigError(f"{section}.{name}", None, f"is needed for {kind} scaling")
    for name, value in given.items():
        if name not in required + optional and (name, value) != ("truncate", True):
            raise ConfigError(f"{section}.{name}", value, f"is not implemented for {kind} scaling")
    scaling = {name: given[name] for name in required + optional if name in given}
    return {**_mscales(section, given), **scaling} if kind == "yarn" else scaling


def _mscales(section: str, given: dict[str, Any]) -> dict[str, float]:
    """Defaults of the two temperatures. Readers of a config.json disagree when only one of them is there, or is 0."""
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if (mscale is None) != (all_dim is None) or mscale == 0 or all_dim == 0:
        value = {"mscale": mscale, "mscale_all_dim": all_dim}
        raise ConfigError(f"{section}.mscale", value, "is read in different ways; give mscale and mscale_all_dim both above 0, or neither")
    return {"mscale": RopeScaling.mscale, "mscale_all_dim": 0.0}


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of an architecture, in the release's layout. Raises ConfigError for what that layout cannot say."""
    per_group = config.group_top_k or config.num_experts_per_tok // config.topk_group
    if config.n_group > config.topk_group and per_group != _GROUP_TOP_K:
        raise ConfigError("model.group_top_k", config.group_top_k, f"public readers score a group by its best {_GROUP_TOP_K}; "
                          "a model trained otherwise cannot be exported")  # fmt: skip
    if config.scoring_func != "sigmoid":
        raise ConfigError("model.scoring_func", config.scoring_func, "readers of public checkpoints compute only 'sigmoid'")
    fields = {name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)}
    fixed = {**_FIXED, "num_key_value_heads": config.num_attention_heads}
    rope = {"rope_theta": config.rope_theta, "rope_scaling": _rope_scaling_to_hf(config.rope_scaling)}
    return {"architectures": ["DeepseekV3ForCausalLM"], **fixed, **fields, **rope, "torch_dtype": dtype}


def _rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.type == "none":
        return None
    if scaling.type == "linear":
        return {"type": "linear", "factor": scaling.factor}
    if scaling.mscale_all_dim == 0:  # how an absent pair is kept here, see _mscales
        return {name: value for name, value in dataclasses.asdict(scaling).items() if not name.startswith("mscale")}
    return dataclasses.asdict(scaling)
