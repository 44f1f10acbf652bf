"""The public checkpoint format: config.json and tensors by the names that DeepSeek-V3's release and transformers use.

`checkpoint_layout` is the one table: every public tensor, and the slice of which parameter it fills. The
public format keeps torch's [out, in] weights, one tensor a layer and expert; here kernels are [in, out],
layers and experts are stacked, and gate and up projections share a leaf [in, 2, ffn].
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dsv3_jax.config import ConfigError, ModelConfig, RopeScaling, default_config, from_config_dict
from dsv3_jax.model.init import init_router_bias, parameter_shapes
from dsv3_jax.model.transformer import Params, RouterBias


class CheckpointError(ValueError):
    """A tensor that cannot be used, and what is wrong with it, in one line."""

    def __init__(self, tensor: str, problem: str):
        super().__init__(f"{tensor}: {problem}")
        self.tensor = tensor


# --- config.json ---

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
    })  # fmt: skip
    run.train.sequence_length = run.model.max_position_embeddings
    return from_config_dict(run).model


def _check_fields(config_json: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if name not in config_json:
            raise ConfigError(name, None, "is missing from config.json")
    fixed = {**_FIXED, "num_key_value_heads": config_json["num_attention_heads"]}
    known = {*_REQUIRED, *_OPTIONAL, *_ROPE_FIELDS, *_UNUSED, *fixed}
    for name, value in config_json.items():
        if name not in known:
            raise ConfigError(name, value, "this field of config.json is not known here; remove it if the model does not depend on it")
        if name in fixed and value != fixed[name]:
            raise ConfigError(name, value, f"only {fixed[name]!r} is implemented")


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


# --- tensors ---


class Piece(NamedTuple):
    """One public tensor and the part of a parameter that it fills: `parameter[where] = tensor.T` (`tensor` for the embedding)."""

    tensor: str
    path: str  # "params/moe/self_attn/o_proj/kernel", or "bias/moe" for the router bias
    where: tuple[int | slice, ...]
    shape: tuple[int, ...]  # of the public tensor


_TOP_TENSORS = {
    "params/embed": "model.embed_tokens.weight",
    "params/norm": "model.norm.weight",
    "params/lm_head": "lm_head.weight",
}
# Parameter of a layer -> the public tensors in it, below "model.layers.N.". Two: gate and up, on the axis before
# the last. "{expert}": one for every expert, on a leading axis.
_LAYER_TENSORS = {
    "input_layernorm/scale": ("input_layernorm.weight",),
    "post_attention_layernorm/scale": ("post_attention_layernorm.weight",),
    "self_attn/q_proj/kernel": ("self_attn.q_proj.weight",),
    "self_attn/q_a_proj/kernel": ("self_attn.q_a_proj.weight",),
    "self_attn/q_a_layernorm/scale": ("self_attn.q_a_layernorm.weight",),
    "self_attn/q_b_proj/kernel": ("self_attn.q_b_proj.weight",),
    "self_attn/kv_a_proj_with_mqa/kernel": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attn/kv_a_layernorm/scale": ("self_attn.kv_a_layernorm.weight",),
    "self_attn/kv_b_proj": ("self_attn.kv_b_proj.weight",),
    "self_attn/o_proj/kernel": ("self_attn.o_proj.weight",),
    "mlp/gate_up_proj": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp/down_proj": ("mlp.down_proj.weight",),
    "mlp/router": ("mlp.gate.weight",),
    "mlp/shared_experts/gate_up_proj": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "mlp/shared_experts/down_proj": ("mlp.shared_experts.down_proj.weight",),
    "mlp/experts/gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp/experts/down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    "enorm/scale": ("enorm.weight",),
    "hnorm/scale": ("hnorm.weight",),
    "eh_proj/kernel": ("eh_proj.weight",),
    "norm/scale": ("shared_head.norm.weight",),
    "": ("mlp.gate.e_score_correction_bias",),  # "bias/moe" and "bias/mtp" have nothing below the stack
}
_SHARED_COPIES = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def checkpoint_layout(config: ModelConfig) -> list[Piece]:
    """Every tensor of the public checkpoint of this architecture, MTP modules included, and where it belongs."""
    return [piece for path, leaf in _shapes(config).items() for piece in _pieces(path, leaf, config)]


def params_from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[Params, RouterBias]:
    """Parameters and router bias, float32, from tensors of a public checkpoint (FP8 ones dequantized before).

    Left out: the MTP modules' copies of embedding and head, the head of a tied model, and MTP modules beyond
    `num_nextn_predict_layers`. Raises CheckpointError for a tensor that is missing, misshapen or unknown.
    """
    layout = checkpoint_layout(config)
    _check_names(tensors, layout, config)
    leaves = {path: np.empty(shape, np.float32) for path, shape in _shapes(config).items()}
    for piece in layout:
        value = np.asarray(tensors[piece.tensor])
        if value.shape != piece.shape:
            raise CheckpointError(piece.tensor, f"has shape {value.shape}, config.json asks for {piece.shape}")
        leaves[piece.path][piece.where] = value if piece.path == "params/embed" else value.T
    tree = jax.tree.unflatten(jax.tree.structure(_abstract(config)), [jnp.asarray(leaf) for leaf in leaves.values()])
    return tree["params"], RouterBias(**tree["bias"])


@functools.cache  # tracing the modules takes a second
def _abstract(config: ModelConfig) -> dict[str, Any]:
    bias = jax.eval_shape(lambda: init_router_bias(config))
    return {"bias": bias._asdict(), "params": parameter_shapes(config)}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path, in the order of the tree."""
    leaves, _ = jax.tree.flatten_with_path(_abstract(config))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _pieces(path: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Piece]:
    if path in _TOP_TENSORS:
        yield Piece(_TOP_TENSORS[path], path, (), shape if path == "params/embed" else shape[::-1])
        return
    _, stack, *rest = path.split("/")
    names = _LAYER_TENSORS["/".join(rest).removeprefix("block/")]
    first = {"dense": 0, "moe": config.num_dense_layers, "mtp": config.num_hidden_layers}[stack]
    for layer in range(shape[0]):
        for expert in range(shape[1]) if "{expert}" in names[0] else (None,):
            for part, name in enumerate(names):
                where: tuple[int | slice, ...] = (layer,) if expert is None else (layer, expert)
                inner = shape[len(where) :]
                if len(names) > 1:
                    where, inner = (*where, slice(None), part), (inner[0], *inner[2:])
                yield Piece(f"model.layers.{first + layer}.{name.format(expert=expert)}", path, where, inner[::-1])


def _check_names(tensors: Mapping[str, np.ndarray], layout: list[Piece], config: ModelConfig) -> None:
    wanted = {piece.tensor: piece for piece in layout}
    for name, piece in wanted.items():
        if name not in tensors:
            raise CheckpointError(name, f"is missing from the checkpoint; config.json asks for it with shape {piece.shape}")
    for name in tensors:
        if name not in wanted and not _is_left_out(name, config):
            raise CheckpointError(name, "is not a tensor of the architecture that config.json describes")


def _is_left_out(name: str, config: ModelConfig) -> bool:
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers + config.num_nextn_predict_layers
    return beyond or _SHARED_COPIES.fullmatch(name) is not None
