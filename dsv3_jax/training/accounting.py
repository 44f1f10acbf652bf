"""What a configuration costs: parameters, memory, FLOPs and cache. Counted from shapes, nothing is allocated.

Parameters are counted from the shapes that `init` fills and not from a formula. FLOPs follow the usual
convention for model FLOPs utilisation: multiplications and additions of matrix products, three times the
forward pass for a training step, and nothing for what the backward pass computes again.
"""

import functools
import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsv3_jax.config import Config, ModelConfig, TrainConfig
from dsv3_jax.inference.cache import init_cache
from dsv3_jax.model.attention import resolve_implementation
from dsv3_jax.model.init import parameter_shapes
from dsv3_jax.model.moe import block_rows, plan_blocks
from dsv3_jax.model.transformer import SAVED_NAMES
from dsv3_jax.parallel.expert import Placement, arriving_pairs, make_hops
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import parameter_name, places
from dsv3_jax.precision.formats import E4M3, E5M6, Format
from dsv3_jax.precision.policy import TILES
from dsv3_jax.precision.quantize import quantize
from dsv3_jax.training.pipeline_step import room_of_rank
from dsv3_jax.training.schedule import batch_size

FLOAT32_BYTES = 4
H800_PEAK = 989.5e12  # FLOP/s of dense BF16 products; FP8 reaches twice that
PUBLISHED_HOURS_PER_TRILLION = 180e3  # H800 hours that a trillion tokens of V3's pre-training took (V3 sec. 1)

# Top-level entries of the parameters, in the order that a token meets them.
SECTIONS = ("embed", "dense", "moe", "norm", "lm_head", "mtp")
# Names on the path of a parameter, and the part that the first of them puts it in; scales are "norms" wherever they are.
_PARTS = {
    "embed": "embedding",
    "lm_head": "output head",
    "eh_proj": "input projection",
    "self_attn": "attention",
    "router": "router",
    "shared_experts": "shared experts",
    "experts": "routed experts",
    "mlp": "feed-forward",
}
_ORDER = (*_PARTS.values(), "norms")


class Part(NamedTuple):
    """Parameters of one part of all layers of a kind."""

    section: str  # one of SECTIONS
    name: str  # one of _ORDER
    layers: int
    parameters: int  # all layers together
    activated: int  # of these, the parameters that work on a token


class ParameterCounts(NamedTuple):
    """`total` and `activated` are of the main model; `mtp` leaves out the embedding and head that it shares."""

    total: int
    activated: int
    mtp: int


@functools.cache
def parameter_parts(model: ModelConfig) -> tuple[Part, ...]:
    """Every parameter of the main model and the MTP modules, by section and part."""
    counts: Counter[tuple[str, str]] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(model)):
        names = [entry.key for entry in path]
        counts[names[0], _part_name(names)] += math.prod(leaf.shape)
    ordered = sorted(counts.items(), key=lambda item: (SECTIONS.index(item[0][0]), _ORDER.index(item[0][1])))
    return tuple(
        Part(section, name, layers_of(model)[section], count, _activated(model, name, count)) for (section, name), count in ordered
    )


def _part_name(names: list[str]) -> str:
    if names[-1] in ("scale", "norm"):
        return "norms"
    return next(part for name, part in _PARTS.items() if name in names)


def _activated(model: ModelConfig, part: str, parameters: int) -> int:
    return parameters // model.n_routed_experts * model.num_experts_per_tok if part == "routed experts" else parameters


def layers_of(model: ModelConfig) -> dict[str, int]:
    """How many layers each section has."""
    stacks = {"dense": model.num_dense_layers, "moe": model.num_moe_layers, "mtp": model.num_nextn_predict_layers}
    return {section: stacks.get(section, 1) for section in SECTIONS}


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts as the report states them: both embedding and head are activated, and only the picked experts."""
    parts = parameter_parts(model)
    main = [part for part in parts if part.section != "mtp"]
    mtp = sum(part.parameters for part in parts if part.section == "mtp")
    return ParameterCounts(sum(part.parameters for part in main), sum(part.activated for part in main), mtp)


class Flops(NamedTuple):
    """Training FLOPs of a token, forward and backward."""

    products: int  # parameters of the main model
    attention: int  # scores and weighted values of the main model
    mtp_products: int
    mtp_attention: int

    @property
    def total(self) -> int:
        return sum(self)


def training_flops(model: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs of training on one token of a row of T = `sequence_length`, averaged over the row.

    Products: a parameter costs a multiplication and an addition in each of Fprop, Dgrad and Wgrad, so 6 for
    each that a token is multiplied by. The head counts once for the main model and once for each MTP module,
    the embedding, which is looked up, and the norms not at all. Attention: token i sees i tokens, on average
    (T + 1) / 2, and 2 (qk_head_dim + v_head_dim) FLOPs a head go forward for each; three times that in all.
    The last tokens of a row, for which MTP has no target, are counted like the others.
    """
    head, depth = model.hidden_size * model.vocab_size, model.num_nextn_predict_layers
    multiplied = [part for part in parameter_parts(model) if part.name not in ("embedding", "output head", "norms")]
    main = sum(part.activated for part in multiplied if part.section != "mtp")
    mtp = sum(part.activated for part in multiplied if part.section == "mtp")
    attention = 3 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * (sequence_length + 1)
    return Flops(6 * (main + head), model.num_hidden_layers * attention, 6 * (mtp + depth * head), depth * attention)


def model_flops_per_token(config: Config) -> int:
    """Training FLOPs of a token, MTP included: the numerator of model FLOPs utilisation."""
    return training_flops(config.model, config.train.sequence_length).total


def tokens_of_run(train: TrainConfig) -> int:
    """Tokens of `train.steps` steps, batch ramp included."""
    tokens = 0
    for step in range(train.steps):
        if tokens >= train.batch_ramp_tokens:
            return tokens + (train.steps - step) * train.batch_size * train.sequence_length
        tokens += batch_size(tokens, train) * train.sequence_length
    return tokens


def h800_hours(tokens: float | int, flops_per_token: int, utilisation: float) -> float:
    """GPU hours of training on H800s that reach the share `utilisation` of their BF16 peak."""
    return tokens * flops_per_token / (H800_PEAK * utilisation) / 3600


def published_utilisation() -> float:
    """Share of the BF16 peak that V3's 180 thousand hours a trillion tokens stand for, by this file's FLOPs."""
    return h800_hours(1e12, training_flops(ModelConfig(), 4096).total, 1.0) / PUBLISHED_HOURS_PER_TRILLION


def cache_bytes_per_token(model: ModelConfig) -> int:
    """Bytes of bf16 latents that a token keeps over all layers of the main model."""
    return sum(math.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_cache(model, 1, 1, "bfloat16"))))


def mha_bytes_per_token(model: ModelConfig) -> int:
    """Bytes of bf16 keys and values that attention with the same heads would keep, uncompressed and without decoupled keys."""
    return 2 * model.num_hidden_layers * model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)


class Memory(NamedTuple):
    """Bytes of one kind of tensor: of one whole copy, and of a device's part of it."""

    kind: str
    whole: int
    per_device: int
    note: str


def parameters_per_device(config: Config, kind: str) -> Counter[str]:
    """Parameters of each section that one device holds, by its `master` or its `compute` place (`parallel.sharding`)."""
    mesh, held = config.parallel.mesh, Counter[str]()
    abstract = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
    where = places(parameter_shapes(config.model), abstract)
    for (path, leaf), at in zip(jax.tree_util.tree_leaves_with_path(parameter_shapes(config.model)), jax.tree.leaves(where), strict=True):
        held[parameter_name(path).split("/")[0]] += leaf.size // at.parts(kind, abstract)
    return held


def parameters_at_use(config: Config) -> tuple[int, int]:
    """Parameters that a device computes with in float32, and those of them that one backward pass has gradients of."""
    if config.parallel.shard == "parameters":
        master = parameters_per_device(config, "master").total()
        return master, master
    room, whole, held = room_of_rank(config), layers_of(config.model), parameters_per_device(config, "compute")
    own = sum(held[kind] // whole[kind] * (whole | room.layers)[kind] for kind in ("dense", "moe") if whole[kind])
    shared = sum(size for section, size in held.items() if section not in ("dense", "moe"))
    return room.stages * own + shared, own + shared


def device_memory(config: Config) -> list[Memory]:
    """What training holds on the devices at its peak, kind by kind: the backward pass of a micro-batch.

    On a pipeline that of a rank with the last stage, which runs the heads and MTP modules; activations over one rank's devices.
    Left out: the logits of one chunk, expert kernels that the reference `grouped_linear` gathers, what XLA
    needs inside one operation, and with `parallel.shard=parameters` the weights gathered for one layer.
    """
    counts, train, moments = count_parameters(config.model), config.train, config.optimizer.moment_dtype
    parameters, accumulates, shard = counts.total + counts.mtp, train.batch_size > train.micro_batch_size, config.parallel.shard
    devices, master = config.parallel.mesh.batch_devices, parameters_per_device(config, "master").total()
    at_use, of_pass = parameters_at_use(config)
    compute = parameters_per_device(config, "compute").total()
    summed = at_use if shard == "optimizer" else master
    cast, cast_to = cast_bytes(config), "E4M3" if config.precision.policy == "fp8" else train.compute_dtype
    # The loss makes a gradient of the head for every use of it; the first is the one counted with the parameters.
    head_gradients = config.model.num_nextn_predict_layers * config.model.hidden_size * config.model.vocab_size
    gradients = (2 if accumulates else 1) * parameters + head_gradients
    gathered = 0 if at_use == master else parameters
    moment_bytes, activations, recomputed = (
        2 * jnp.dtype(moments).itemsize,
        sum(activation_bytes(config).values()),
        recomputed_bytes(config),
    )
    gradient_note = "float32" + (", of a micro-batch and their sum" if accumulates else "")
    gradients_held = of_pass + (summed if accumulates else 0) + head_gradients
    return [
        Memory("master", FLOAT32_BYTES * parameters, FLOAT32_BYTES * master, "float32 parameters, MTP included"),
        Memory("gathered", FLOAT32_BYTES * gathered, FLOAT32_BYTES * at_use if gathered else 0, "float32 copies that a step computes with"),
        Memory("weights", cast, cast * compute // parameters if gathered else cast,
               f"{cast_to} copies, made a layer at a time" if cast else "none: products take the float32 weights"),
        Memory("gradients", FLOAT32_BYTES * gradients, FLOAT32_BYTES * gradients_held, gradient_note),
        Memory("moments", moment_bytes * parameters, moment_bytes * master, f"{moments}, first and second"),
        Memory("activations", activations, -(-activations // devices), f"kept for the backward pass, remat {train.remat}"),
        Memory("recomputed", recomputed, -(-recomputed // devices), "activations of the layer that the backward pass is in"),
    ]  # fmt: skip


def ema_bytes(config: Config) -> int:
    """Host memory of the moving average, one float32 copy a process."""
    counts = count_parameters(config.model)
    return FLOAT32_BYTES * (counts.total + counts.mtp) if config.train.ema_decay > 0 else 0


def cast_bytes(config: Config) -> int:
    """Kernels as products take them, most at one time: a layer's, without the router, or the head.

    0 for those that are float32 there too. The scales of FP8 kernels, 4 bytes a block of 128x128, are left out.
    """
    wide = 0 if config.train.compute_dtype == "float32" else jnp.dtype(config.train.compute_dtype).itemsize
    narrow = 1 if config.precision.policy == "fp8" else wide
    sizes: Counter[str] = Counter()
    for part in parameter_parts(config.model):
        if part.name not in ("embedding", "norms", "router"):
            itemsize = wide if part.name in ("input projection", "output head") else narrow
            sizes[part.section] += part.parameters // part.layers * itemsize
    return max(*sizes.values(), config.model.hidden_size * config.model.vocab_size * wide)


def activation_bytes(config: Config, remat: str | None = None) -> dict[str, int]:
    """Bytes kept for the backward pass of one micro-batch over all devices, by section.

    `remat`: another policy than the configuration's. Of the heads' input the gradient is kept, which the loss
    makes in its forward pass. On a pipeline those of one rank: of the stage that it runs, and what waits for its backward pass.
    """
    model, train = config.model, config.train
    tokens, itemsize = train.micro_batch_size * train.sequence_length, jnp.dtype(train.compute_dtype).itemsize
    policy = remat or train.remat
    heads, d = 1 + model.num_nextn_predict_layers, model.hidden_size
    # A MTP module takes an embedding beside the hidden state.
    extra = {"dense": 0, "moe": 0, "mtp": tokens * d * itemsize}
    layers = {
        section: count * (extra[section] + sum(layer_activations(config, section != "dense", policy).values()))
        for section, count in (layers_of(model) | room_of_rank(config).layers).items()
        if section in extra and count
    }
    return {**layers, "heads": heads * tokens * d * itemsize, "waiting": room_of_rank(config).slots * tokens * d * itemsize}


def recomputed_bytes(config: Config) -> int:
    """Bytes of what the backward pass computes again of one micro-batch, in the layer where that is most."""

    def recomputed(is_moe: bool) -> int:
        return sum(layer_activations(config, is_moe, "none").values()) - sum(layer_activations(config, is_moe, config.train.remat).values())

    return max(recomputed(section != "dense") for section in ("dense", "moe", "mtp") if layers_of(config.model)[section])


def layer_activations(config: Config, is_moe: bool, remat: str) -> dict[str, int]:
    """Bytes that one layer keeps of one micro-batch, by the name of the tensor.

    full: the layer's input. selective: also `SAVED_NAMES`. none: also the other operands of products, norms and
    nonlinearities, within 10 % of what autodiff keeps.
    """
    model, train = config.model, config.train
    tokens, itemsize = train.micro_batch_size * train.sequence_length, jnp.dtype(train.compute_dtype).itemsize
    kept = {"layer_input": tokens * model.hidden_size * itemsize}
    if remat in ("selective", "none"):
        kept |= saved_bytes(config, is_moe, tokens, itemsize)
    if remat == "none":
        kept |= _recomputed_bytes(config, is_moe, tokens, itemsize)
    return kept


def saved_bytes(config: Config, is_moe: bool, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes of each of `SAVED_NAMES` in one layer."""
    m = config.model
    sizes = {
        "q_latent": tokens * (m.q_lora_rank or 0) * itemsize,
        "kv_latent": tokens * (m.kv_lora_rank + m.qk_rope_head_dim) * itemsize,
        "attention_out": product_input_bytes(config, tokens, m.num_attention_heads * m.v_head_dim, E5M6),
        "attention_residual": tokens * m.hidden_size * itemsize,
        "swiglu_in": sum(product_input_bytes(config, rows, 2 * width) for rows, width in _ffns(config, is_moe, tokens)),
        "routing": tokens * m.num_experts_per_tok * 4 if is_moe else 0,
    }
    return {name: sizes[name] for name in SAVED_NAMES}


@functools.cache
def product_input_bytes(config: Config, rows: int, width: int, stored: Format = E4M3) -> int:
    """Bytes that the backward pass keeps of what goes into a product: in FP8 its values in `stored`, and their scales."""
    x = jax.ShapeDtypeStruct((rows, width), config.train.compute_dtype)
    tile = TILES[config.precision.activation_tile]
    parts = jax.eval_shape(lambda x: jax.tree.leaves(quantize(x, tile, stored)), x) if config.precision.policy == "fp8" else [x]
    return sum(part.size * part.dtype.itemsize for part in parts)


def _ffns(config: Config, is_moe: bool, tokens: int) -> list[tuple[int, int]]:
    """Rows and inner width of each SwiGLU of a layer."""
    model = config.model
    if not is_moe:
        return [(tokens, model.intermediate_size)]
    routed, shared = (buffer_rows(config, tokens), model.moe_intermediate_size), model.n_shared_experts * model.moe_intermediate_size
    return [routed, (tokens, shared)] if shared else [routed]


def _recomputed_bytes(config: Config, is_moe: bool, tokens: int, itemsize: int) -> dict[str, int]:
    """What remat="none" keeps beside `saved_bytes`; a norm keeps float32 copies before and after its scale is applied.

    What a norm returns is kept once, by the products that take it; in FP8 each of them keeps it quantized.
    """
    m, in_fp8 = config.model, config.precision.policy == "fp8"
    copies = FLOAT32_BYTES * (1 if itemsize == FLOAT32_BYTES else 2) + (0 if in_fp8 else itemsize)
    heads = m.num_attention_heads
    fused = resolve_implementation(config.precision.impl, "gpu", config.train.compute_dtype) == "cudnn"
    per_score = 0 if fused else 2 * FLOAT32_BYTES + itemsize + 1
    of_norms = [m.hidden_size] * 2 + [m.kv_lora_rank] + ([m.q_lora_rank] if m.q_lora_rank else [])
    of_norms += [m.hidden_size] if not is_moe or m.n_shared_experts else []
    return {
        "norms": tokens * copies * (2 * m.hidden_size + (m.q_lora_rank or 0) + m.kv_lora_rank),
        "queries_keys_values": tokens * heads * (2 * m.qk_head_dim + m.v_head_dim) * itemsize,
        "attention_scores": tokens * heads * (config.train.sequence_length * per_score + 2 * FLOAT32_BYTES),
        "expert_inputs": product_input_bytes(config, buffer_rows(config, tokens), m.hidden_size) if is_moe else 0,
        "quantized_inputs": sum(product_input_bytes(config, tokens, width) for width in of_norms) if in_fp8 else 0,
        "router_input": FLOAT32_BYTES * tokens * m.hidden_size if is_moe and in_fp8 else 0,
    }


@functools.cache
def buffer_rows(config: Config, tokens: int) -> int:
    """Rows of the buffers of routed experts on all GPUs: one for each (token, expert) pair that there is room for, and padding."""
    model, mesh = config.model, config.parallel.mesh
    here, k = model.n_routed_experts // mesh.expert_devices, model.num_experts_per_tok
    placement = Placement(hops=make_hops(config.parallel.dispatch, mesh, model), bound=config.parallel.dispatch_bound)
    of_device = tokens // mesh.batch_devices
    most = arriving_pairs(of_device, k, model.n_routed_experts, placement) if placement.hops else None
    rows = block_rows(of_device * k, here, "gpu")
    experts = jax.ShapeDtypeStruct((of_device, k), jnp.int32)
    plan = jax.eval_shape(functools.partial(plan_blocks, n_experts=here, rows=rows, most=most), experts)
    return plan.pair.shape[0] * mesh.batch_devices
