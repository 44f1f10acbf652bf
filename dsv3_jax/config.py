"""Frozen run configuration, built strictly from an `ml_collections.ConfigDict`.

A config file fills a ConfigDict that starts from `default_config()`; `from_config_dict` freezes it into
the dataclasses below, once, and only those travel on. Model fields carry the names of the public
checkpoint's config.json. Every rejected value raises `ConfigError`, which names the field, the value
and the remedy.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from dsv3_jax.config_checks import ConfigError, nearest_name, validate


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Position scaling of the decoupled RoPE part (YaRN, 2309.00071; V3 sec. 4.3)."""

    type: str = "none"  # none | linear | yarn
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture, with the names of the public config.json (V3 sec. 4.2 values as defaults)."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 1  # MTP depth D
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536  # None: queries straight from the hidden state
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8  # 1: ungrouped routing
    topk_group: int = 4
    group_top_k: int | None = None  # a group scores the sum of so many of its best experts; None: K / M of them, as in the paper
    scoring_func: str = "sigmoid"  # sigmoid | softmax
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    aux_loss_alpha: float = 1e-4
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: RopeScaling = RopeScaling()

    @property
    def num_dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens (V3 sec. 4.1)."""

    source: str = "stdlib"  # stdlib | text:GLOB | jsonl:GLOB#field | parquet:GLOB#column
    held_out: float = 0.05  # share of documents kept for validation
    tokenizer: str = ""  # path of a tokenizer.json; empty: train a byte-level BPE on the source
    fim_rate: float = 0.1  # share of documents turned into prefix-suffix-middle
    boundary_split_rate: float = 0.1  # chance that a token of punctuation + line break is split
    document_mask: bool = False  # True: no attention and no loss across documents
    num_shards: int = 8  # independent document streams; the number of processes must divide it
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, counted in tokens (V3 sec. 4.2)."""

    peak_lr: float = 2.2e-4
    final_lr: float = 2.2e-5  # end of the cosine, and first tail
    tail_lr: float = 7.3e-6  # last tail
    warmup_tokens: float = 0.0  # linear from 0
    constant_tokens: float = 0.0  # where the constant phase ends, counted from the start
    cosine_tokens: float = 1.0  # length of the cosine
    tail_tokens: float = 0.0  # length of the first tail; after it tail_lr
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "bfloat16"  # float32 | bfloat16, both moments


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch, losses and cadence of a run."""

    steps: int = 1000
    seed: int = 0
    sequence_length: int = 4096
    micro_batch_size: int = 8  # sequences of one forward and backward pass, over all devices
    batch_size: int = 8  # sequences of a step once the ramp is over
    batch_size_start: int = 8  # sequences of the first step
    batch_ramp_tokens: float = 0.0
    compute_dtype: str = "bfloat16"  # float32 | bfloat16
    remat: str = "selective"  # none | selective | full
    balance: str = "loss_free"  # loss_free | auxiliary | sequence_wise | batch_wise (over a micro-batch)
    bias_update_speed: float = 1e-3  # gamma, used by loss_free
    bias_update_tokens: float | None = None  # gamma is 0 after that many tokens; None: never
    mtp_loss_weight: float = 0.3  # lambda
    mtp_loss_weight_late: float = 0.1
    mtp_switch_tokens: float | None = None  # lambda becomes mtp_loss_weight_late there; None: never
    ema_decay: float = 0.0  # 0: no moving average of the parameters
    eval_every: int = 100
    eval_sequences: int = 64
    max_skipped_steps: int = 10  # non-finite steps in a row before the run stops


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """How the products of linear layers are made, and which implementation computes attention (V3 sec. 3.3)."""

    policy: str = "bf16"  # bf16 (products in train.compute_dtype) | fp8 (E4M3 for Fprop, Dgrad and Wgrad of linear layers)
    activation_tile: str = "1x128"  # share one FP8 scale: 1x128 | 128x128 | tensor; inputs of linear layers
    gradient_tile: str = "1x128"  # gradients of their outputs
    weight_tile: str = "128x128"
    impl: str = "auto"  # auto (on Hopper the Pallas kernels; on a GPU a fused bf16 attention) | reference | pallas


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. Sequences of a micro-batch are spread over data x node x gpu."""

    pipe: int = 1  # ranks of the pipeline; 1: none
    data: int = 1  # groups that each hold all experts
    node: int = 1  # hosts of such a group: routed experts are spread over node x gpu
    gpu: int = 1  # devices of a host

    @property
    def batch_devices(self) -> int:
        """Devices that a micro-batch is spread over."""
        return self.data * self.node * self.gpu

    @property
    def expert_devices(self) -> int:
        """Devices that the routed experts are spread over."""
        return self.node * self.gpu

    @property
    def devices(self) -> int:
        return self.pipe * self.batch_devices


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over devices."""

    mesh: MeshConfig = MeshConfig()
    dispatch: str = "direct"  # how tokens reach experts: direct | two_hop (along node once a target node, then along gpu)
    dispatch_bound: float | None = None  # rows of dispatch buffers, in multiples of a balanced load; None: the worst case
    overlap: bool = False  # a device's rows go through each layer in two halves: dispatch of one can run beside products of the other
    shard: str = "optimizer"  # cut over devices: optimizer (ZeRO-1) | gradients (ZeRO-2) | parameters (FSDP)
    schedule: str = "dualpipe"  # of the pipeline, where mesh.pipe > 1: gpipe | 1f1b | zb1p | dualpipe | dualpipe_v


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and how much of it is kept."""

    every: int = 100
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init_from: str = ""  # converted or public checkpoint that a new run starts from; empty: random values


def default_config() -> ConfigDict:
    """A mutable ConfigDict holding every field at its default; config files start from it."""
    return _to_config_dict(Config())


def _to_config_dict(node: Any) -> ConfigDict:
    out = ConfigDict()
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = _to_config_dict(value)
        elif _is_optional(hints[field.name]):  # a placeholder may hold None and still knows its type
            out[field.name] = config_dict.placeholder(_inner_type(hints[field.name]))
            out[field.name] = value
        else:
            out[field.name] = value
    return out


def schedule_by_shares(
    config: ConfigDict,
    warmup: float = 0.05,
    constant: float = 0.5,
    cosine: float = 0.4,
    tail: float = 0.05,
    mtp: float = 0.7,
    bias: float = 0.95,
) -> None:
    """Sets the phases of all schedules as shares of the run's tokens; they follow later overrides of its steps and of their size.

    The phases of `OptimizerConfig`, then where the weight of the MTP loss switches and where router biases stop moving.
    """
    optimizer, train = config.optimizer, config.train
    tokens = train.get_ref("steps").to_float() * train.get_ref("batch_size").to_float() * train.get_ref("sequence_length").to_float()
    optimizer.warmup_tokens = tokens * warmup
    optimizer.constant_tokens = tokens * constant
    optimizer.cosine_tokens = tokens * cosine
    optimizer.tail_tokens = tokens * tail
    train.mtp_switch_tokens = tokens * mtp
    train.bias_update_tokens = tokens * bias


def _is_optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _inner_type(hint: Any) -> type:
    return next(arg for arg in typing.get_args(hint) if arg is not type(None)) if _is_optional(hint) else hint


def from_config_dict(config: ConfigDict) -> Config:
    """Freezes a ConfigDict into a validated `Config`. Raises `ConfigError` for any field it cannot use."""
    return from_dict(config)


def _freeze(cls: Any, node: Any, path: str) -> Any:
    if not hasattr(node, "items"):
        raise ConfigError(path, node, f"is a section with the fields {', '.join(f.name for f in dataclasses.fields(cls))}")
    hints = typing.get_type_hints(cls)
    for name in node:
        if name not in hints:
            raise ConfigError(f"{path}.{name}", node[name], f"unknown field, {nearest_name(name, list(hints))}")
    values = {}
    for name, value in node.items():
        hint, field = hints[name], f"{path}.{name}"
        values[name] = _freeze(hint, value, field) if dataclasses.is_dataclass(hint) else _checked(hint, value, field)
    return cls(**values)


def _checked(hint: Any, value: Any, field: str) -> Any:
    expected = _inner_type(hint)
    if value is None and _is_optional(hint):
        return None
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(field, value, f"must be {expected.__name__}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(field, value, "must be a finite number")
    return value


def check_override(path: str, text: str) -> None:
    """Checks one `--config.path=text` against the fields and their types; raises `ConfigError`."""
    node: Any = Config
    names = path.split(".")
    for depth, name in enumerate(names):
        hints = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        field = "config." + ".".join(names[: depth + 1])
        if name not in hints:
            remedy = f"unknown field, {nearest_name(name, list(hints))}" if hints else f"config.{'.'.join(names[:depth])} has no fields"
            raise ConfigError(field, text, remedy)
        node = hints[name]
    if _is_optional(node) and text.lower() == "none":
        return
    expected = _inner_type(node)
    if dataclasses.is_dataclass(expected):
        raise ConfigError(f"config.{path}", text, f"is a section; set one of its fields: {', '.join(typing.get_type_hints(expected))}")
    _check_text(expected, text, f"config.{path}")


def is_optional_field(path: str) -> bool:
    """Whether the field at this path, which exists, may be None."""
    *sections, name = path.split(".")
    node: Any = Config
    for section in sections:
        node = typing.get_type_hints(node)[section]
    return _is_optional(typing.get_type_hints(node)[name])


def _check_text(expected: type, text: str, field: str) -> None:
    if expected is bool and text.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(field, text, "must be true or false")
    if expected in (int, float):
        try:
            expected(text)
        except ValueError:
            raise ConfigError(field, text, f"must be {expected.__name__}") from None


def describe_fields() -> str:
    """Every field with its type and default, a line each, for `--help`."""
    lines = []

    def visit(cls: Any, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint, name = hints[field.name], prefix + field.name
            if dataclasses.is_dataclass(hint):
                visit(hint, name + ".")
            else:
                lines.append(f"  {name}: {_inner_type(hint).__name__} = {field.default!r}")

    visit(Config, "")
    return "\n".join(lines)


def from_dict(config: Any) -> Config:
    """The inverse of `to_dict`."""
    frozen = _freeze(Config, config, "config")
    validate(frozen)
    return frozen


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dictionaries, for JSON."""
    return dataclasses.asdict(config)
