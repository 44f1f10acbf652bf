"""Memory of training on the devices and the host, and of the cache in decoding."""

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.inference.cache import init_cache
from dsv3_jax.model.init import parameter_shapes
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import parameter_name, places
from dsv3_jax.training.accounting.activations import FLOAT32_BYTES, activation_bytes, recomputed_bytes
from dsv3_jax.training.accounting.parameters import count_parameters, layers_of, parameter_parts
from dsv3_jax.training.pipeline_step import room_of_rank


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


def cache_bytes_per_token(model: ModelConfig) -> int:
    """Bytes of bf16 latents that a token keeps over all layers of the main model."""
    return sum(math.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_cache(model, 1, 1, "bfloat16"))))


def mha_bytes_per_token(model: ModelConfig) -> int:
    """Bytes of bf16 keys and values that attention with the same heads would keep, uncompressed and without decoupled keys."""
    return 2 * model.num_hidden_layers * model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
