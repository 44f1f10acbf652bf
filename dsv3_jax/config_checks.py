"""What a configuration may hold: the limits of every field and the relations between fields.

Below `dsv3_jax.config` and without its types: fields are named by their paths, as errors name them.
"""

import difflib
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A field that cannot be used: `field`, its value, and what to do instead, in one line."""

    def __init__(self, field: str, value: object, remedy: str):
        super().__init__(f"{field} = {value!r}: {remedy}")
        self.field = field
        self.remedy = remedy


def nearest_name(name: str, known: Sequence[str]) -> str:
    """' Did you mean X?' for a misspelt name, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"


_CHOICES = {
    "model.scoring_func": ("sigmoid", "softmax"),
    "model.rope_scaling.type": ("none", "linear", "yarn"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "train.compute_dtype": ("float32", "bfloat16"),
    "train.remat": ("none", "selective", "full"),
    "train.balance": ("loss_free", "auxiliary", "sequence_wise", "batch_wise"),
    "precision.impl": ("auto", "reference", "pallas"),
    "precision.policy": ("bf16", "fp8"),
    "parallel.dispatch": ("direct", "two_hop"),
    "parallel.shard": ("optimizer", "gradients", "parameters"),
    "parallel.schedule": ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipe_v"),
    **{f"precision.{name}_tile": ("1x128", "128x128", "tensor") for name in ("activation", "gradient", "weight")},
}
_POSITIVE = (
    "model.vocab_size", "model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads",
    "model.intermediate_size", "model.moe_intermediate_size",
    "model.kv_lora_rank", "model.qk_nope_head_dim", "model.qk_rope_head_dim", "model.v_head_dim",
    "model.max_position_embeddings", "model.initializer_range", "model.rms_norm_eps", "model.rope_theta",
    "model.rope_scaling.factor", "model.rope_scaling.original_max_position_embeddings",
    "model.rope_scaling.beta_fast", "model.rope_scaling.beta_slow", "model.n_group", "model.topk_group", "model.routed_scaling_factor",
    "train.steps", "train.sequence_length", "train.micro_batch_size",
    "train.batch_size", "train.batch_size_start", "train.eval_every", "train.eval_sequences", "train.max_skipped_steps",
    "data.held_out", "optimizer.peak_lr", "optimizer.clip_norm", "optimizer.eps", "data.num_shards", "checkpoint.every", "checkpoint.keep",
    "parallel.mesh.pipe", "parallel.mesh.data", "parallel.mesh.node", "parallel.mesh.gpu",
)  # fmt: skip
_NOT_NEGATIVE = (
    "model.first_k_dense_replace", "model.num_nextn_predict_layers", "model.n_shared_experts", "model.aux_loss_alpha",
    "optimizer.final_lr", "optimizer.tail_lr", "optimizer.warmup_tokens", "optimizer.constant_tokens",
    "optimizer.cosine_tokens", "optimizer.tail_tokens", "optimizer.weight_decay", "train.batch_ramp_tokens",
    "train.bias_update_speed", "train.bias_update_tokens", "train.mtp_switch_tokens", "train.mtp_loss_weight",
    "model.rope_scaling.mscale", "model.rope_scaling.mscale_all_dim", "train.mtp_loss_weight_late",
)  # fmt: skip
_SEEDS = ("train.seed", "data.seed")
_FRACTIONS = ("data.held_out", "data.fim_rate", "data.boundary_split_rate", "train.ema_decay", "optimizer.beta1", "optimizer.beta2")


def _get(config: Any, path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        node = getattr(node, name)
    return node


def _require(ok: bool, config: Any, path: str, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"config.{path}", _get(config, path), remedy)


def validate(config: Any) -> None:
    """Checks every field and every relation between fields; raises `ConfigError` on the first that fails."""
    for path, choices in _CHOICES.items():
        value = _get(config, path)
        _require(value in choices, config, path, f"{nearest_name(value, choices)} (one of {', '.join(choices)})")
    for path in _POSITIVE:
        _require(_get(config, path) > 0, config, path, "must be above 0")
    for path in _NOT_NEGATIVE:
        value = _get(config, path)
        _require(value is None or value >= 0, config, path, "must not be negative")
    for path in _SEEDS:  # a random key takes 32 bits: JAX would drop the others, and seeds would repeat
        _require(0 <= _get(config, path) < 2**32, config, path, f"must lie in 0..{2**32 - 1}")
    for path in _FRACTIONS:
        _require(0 <= _get(config, path) < 1, config, path, "must lie in [0, 1)")
    _validate_model(config)
    _validate_batch(config)
    _validate_parallel(config)


def _validate_model(config: Any) -> None:
    m = config.model
    _require(m.q_lora_rank is None or m.q_lora_rank > 0, config, "model.q_lora_rank", "must be above 0, or None for no compression")
    _require(m.qk_rope_head_dim % 2 == 0, config, "model.qk_rope_head_dim", "must be even: RoPE turns pairs of channels")
    if m.num_moe_layers == 0 and m.num_nextn_predict_layers == 0:
        return
    _require(
        m.n_routed_experts > 0,
        config,
        "model.n_routed_experts",
        "must be above 0, or set model.first_k_dense_replace to model.num_hidden_layers",
    )
    _require(m.n_routed_experts % m.n_group == 0, config, "model.n_routed_experts", f"must be a multiple of model.n_group = {m.n_group}")
    _require(m.group_top_k is None or m.group_top_k > 0, config, "model.group_top_k", "must be above 0, or None for the paper's K / M")
    _require(m.topk_group <= m.n_group, config, "model.topk_group", f"must be at most model.n_group = {m.n_group}")
    reachable = m.topk_group * (m.n_routed_experts // m.n_group)
    _require(0 < m.num_experts_per_tok <= reachable, config, "model.num_experts_per_tok",
             f"must lie in 1..{reachable}: the experts of model.topk_group = {m.topk_group} groups")  # fmt: skip


def _validate_batch(config: Any) -> None:
    t, m = config.train, config.model
    _require(t.sequence_length <= m.max_position_embeddings, config, "train.sequence_length",
             f"must be at most model.max_position_embeddings = {m.max_position_embeddings}")  # fmt: skip
    _require(t.sequence_length > m.num_nextn_predict_layers, config, "train.sequence_length",
             f"must be above the MTP depth model.num_nextn_predict_layers = {m.num_nextn_predict_layers}")  # fmt: skip
    for path in ("train.batch_size", "train.batch_size_start"):
        _require(_get(config, path) % t.micro_batch_size == 0, config, path,
                 f"must be a multiple of train.micro_batch_size = {t.micro_batch_size}")  # fmt: skip
    _require(t.batch_size_start <= t.batch_size, config, "train.batch_size_start", f"must be at most train.batch_size = {t.batch_size}")
    _require(t.micro_batch_size % config.data.num_shards == 0, config, "data.num_shards",
             f"must divide train.micro_batch_size = {t.micro_batch_size}")  # fmt: skip


def _validate_parallel(config: Any) -> None:
    p, t, m = config.parallel, config.train, config.model
    mesh = p.mesh
    if mesh.pipe > 1:
        _validate_pipeline(config)
    spread = f"parallel.mesh.data {mesh.data} x node {mesh.node} x gpu {mesh.gpu} = {mesh.batch_devices}"
    _require(t.micro_batch_size % mesh.batch_devices == 0, config, "train.micro_batch_size", f"must be a multiple of {spread}")
    experts = f"parallel.mesh.node {mesh.node} x gpu {mesh.gpu} = {mesh.expert_devices}"
    _require(m.n_routed_experts % mesh.expert_devices == 0, config, "model.n_routed_experts", f"must be a multiple of {experts}")
    _require(p.dispatch_bound is None or p.dispatch_bound >= 1, config, "parallel.dispatch_bound",
             "must be at least 1, a balanced load; or None for the worst case")  # fmt: skip
    _require(not p.overlap or t.micro_batch_size % (2 * mesh.batch_devices) == 0, config, "train.micro_batch_size",
             f"must be a multiple of 2 x {spread}: parallel.overlap halves the rows of each device")  # fmt: skip
    _require(not p.overlap or t.balance != "batch_wise", config, "parallel.overlap",
             "must be False with train.balance batch_wise, whose loss needs a whole micro-batch in each layer")  # fmt: skip
    _require(p.shard != "parameters" or t.remat != "none", config, "parallel.shard",
             "needs train.remat selective or full: with none every layer's gathered weights would be kept")  # fmt: skip


def _validate_pipeline(config: Any) -> None:
    p, t = config.parallel, config.train
    ranks = p.mesh.pipe
    check_ranks(ranks, "config.parallel.mesh.pipe")
    check_micro_batches(ranks, t.batch_size // t.micro_batch_size, "config.train.batch_size / train.micro_batch_size")
    check_layers(config.model.num_hidden_layers, 2 * ranks if p.schedule == "dualpipe_v" else ranks, "config.model.num_hidden_layers")
    _require(p.shard == "optimizer", config, "parallel.shard", f"must be optimizer where parallel.mesh.pipe = {ranks} is above 1")


def check_ranks(ranks: int, field: str = "P") -> None:
    """Refuses a pipeline of so many ranks where no schedule has them; `field` is what the user calls their number."""
    if ranks < 2 or ranks % 2:
        raise ConfigError(field, ranks, "the number of pipeline ranks must be even and at least 2")


def check_micro_batches(ranks: int, micro_batches: int, field: str = "M") -> None:
    """Refuses so many micro-batches a step on a pipeline of so many ranks."""
    if micro_batches % 2 or micro_batches < 2 * ranks:
        raise ConfigError(field, micro_batches, f"the number of micro-batches must be even and at least 2 P = {2 * ranks}")


def check_layers(layers: int, stages: int, field: str = "model.num_hidden_layers") -> None:
    """Refuses a model that has not a layer for each stage of a pipeline."""
    if layers < stages:
        raise ConfigError(field, layers, f"the pipeline has {stages} stages; use fewer ranks or more layers")
