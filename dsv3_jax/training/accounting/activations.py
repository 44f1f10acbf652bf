"""Bytes of activations that the backward pass of one micro-batch needs, and of those that it computes again."""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.model.attention import resolve_implementation
from dsv3_jax.model.moe import block_rows, plan_blocks
from dsv3_jax.model.transformer import SAVED_NAMES
from dsv3_jax.parallel.expert import Placement, arriving_pairs, block_sizes, make_hops
from dsv3_jax.precision.formats import E4M3, E5M6, Format
from dsv3_jax.precision.hopper import unsupported
from dsv3_jax.precision.policy import TILES, Recipe
from dsv3_jax.precision.quantize import quantize
from dsv3_jax.training.accounting.parameters import layers_of
from dsv3_jax.training.pipeline_step import room_of_rank

FLOAT32_BYTES = 4


def activation_bytes(config: Config, remat: str | None = None) -> dict[str, int]:
    """Bytes kept for the backward pass of one micro-batch over all devices, by section.

    `remat`: another policy than the configuration's. Of the heads' input the gradient is kept, which the loss
    makes in its forward pass. On a pipeline those of one rank: of its stages, and what waits for its backward pass.
    """
    model, train, room = config.model, config.train, room_of_rank(config)
    tokens, itemsize = train.micro_batch_size * train.sequence_length, jnp.dtype(train.compute_dtype).itemsize
    policy = remat or train.remat
    heads, d = 1 + model.num_nextn_predict_layers, model.hidden_size
    # A MTP module takes an embedding beside the hidden state.
    extra = {"dense": 0, "moe": 0, "mtp": tokens * d * itemsize}
    at_once = {"dense": room.kept, "moe": room.kept, "mtp": 1}  # the heads of a micro-batch run in its backward pass
    layers = {
        section: at_once[section] * count * (extra[section] + sum(layer_activations(config, section != "dense", policy).values()))
        for section, count in (layers_of(model) | room.layers).items()
        if section in extra and count
    }
    return {**layers, "heads": heads * tokens * d * itemsize, "waiting": room.slots * tokens * d * itemsize}


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
        "attention_sums": tokens * m.num_attention_heads * FLOAT32_BYTES if _fused_attention(config) else 0,
        "attention_residual": tokens * m.hidden_size * itemsize,
        "swiglu_in": sum(product_input_bytes(config, rows, 2 * width) for rows, width in _ffns(config, is_moe, tokens)),
        # The choice, and of the plan where each pair goes and where each row of the buffers comes from.
        "routing": 4 * (2 * tokens * m.num_experts_per_tok + buffer_rows(config, tokens)) if is_moe else 0,
    }
    return {name: sizes[name] for name in SAVED_NAMES}


def _fused_attention(config: Config) -> bool:
    """Whether a GPU's attention keeps sums of the softmax, and no scores."""
    return resolve_implementation(config.precision.impl, "gpu", config.train.compute_dtype) != "reference"


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
    of_query = 0 if _fused_attention(config) else config.train.sequence_length * (2 * FLOAT32_BYTES + itemsize + 1) + 2 * FLOAT32_BYTES
    of_norms = [m.hidden_size] * 2 + [m.kv_lora_rank] + ([m.q_lora_rank] if m.q_lora_rank else [])
    expert_rows = _expert_input_rows(config, tokens)
    if not is_moe or (m.n_shared_experts and expert_rows > tokens):  # else both kinds of experts keep the same tokens
        of_norms.append(m.hidden_size)
    return {
        "norms": tokens * copies * (2 * m.hidden_size + (m.q_lora_rank or 0) + m.kv_lora_rank),
        "queries_keys_values": tokens * heads * (2 * m.qk_head_dim + m.v_head_dim) * itemsize,
        "attention_scores": tokens * heads * of_query,
        "expert_inputs": product_input_bytes(config, expert_rows, m.hidden_size) if is_moe else 0,
        "quantized_inputs": sum(product_input_bytes(config, tokens, width) for width in of_norms) if in_fp8 else 0,
        "router_input": FLOAT32_BYTES * tokens * m.hidden_size if is_moe and in_fp8 else 0,
    }


def _expert_input_rows(config: Config, tokens: int) -> int:
    """Rows that experts keep of their input: the FP8 kernels gather them again from the tokens that have arrived."""
    m, recipe, dtype = config.model, Recipe.of(config.precision), jnp.dtype(config.train.compute_dtype)
    refused = unsupported(recipe, dtype, (m.hidden_size, 2 * m.moe_intermediate_size), m.moe_intermediate_size, None)
    if not recipe.fp8 or recipe.impl == "reference" or refused:
        return buffer_rows(config, tokens)
    placement, devices = _placement(config), config.parallel.mesh.batch_devices
    if not placement.hops:
        return tokens
    blocks = block_sizes(tokens // devices, config.model.num_experts_per_tok, placement)
    return devices * blocks[-1] * placement.hops[-1].size


def _placement(config: Config) -> Placement:
    return Placement(hops=make_hops(config.parallel.dispatch, config.parallel.mesh, config.model), bound=config.parallel.dispatch_bound)


@functools.cache
def buffer_rows(config: Config, tokens: int) -> int:
    """Rows of the buffers of routed experts on all GPUs: one for each (token, expert) pair that there is room for, and padding."""
    model, mesh = config.model, config.parallel.mesh
    here, k = model.n_routed_experts // mesh.expert_devices, model.num_experts_per_tok
    placement, of_device = _placement(config), tokens // mesh.batch_devices
    most = arriving_pairs(of_device, k, model.n_routed_experts, placement) if placement.hops else None
    rows = block_rows(of_device * k, here, "gpu")
    experts = jax.ShapeDtypeStruct((of_device, k), jnp.int32)
    plan = jax.eval_shape(functools.partial(plan_blocks, n_experts=here, rows=rows, most=most), experts)
    return plan.pair.shape[0] * mesh.batch_devices
