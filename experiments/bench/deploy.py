"""Compiles prefill and decoding of a deployment unit for its whole mesh, without weights and without its devices.

    uv run -m experiments.bench.deploy --config=configs/tiny.py --node=2 --tensor=4
    uv run -m experiments.bench.deploy --config=configs/v3_671b.py --node=4 --gpu=2 --tensor=4 --context=2048 --target=FILE

Prints for both programs the memory of a device, the bytes that it sends in a step by mesh axis, and how many all-to-alls have matrix
products beside them in the schedule. Two micro-batches by default, each of one sequence a device in decoding and one a group in
prefill. A CPU is compiled for as if it were so many devices, in float32. With --target, the description of a GPU
(GpuTargetConfigProto as text), it is compiled for GPUs, which needs the `gpu` extra and no GPU; only there exchanges are asynchronous.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dsv3_jax.config import Config, ConfigError
from experiments import cli
from experiments.bench.targets import gpu_devices, prepare
from experiments.output import check_outputs, gib, table

if TYPE_CHECKING:
    from dsv3_jax.inference.unit import Unit

CONFIG = cli.define_config()
NODE = flags.DEFINE_integer("node", 1, "Nodes of the unit.", lower_bound=1)
GPU = flags.DEFINE_integer("gpu", 1, "Groups of a node, each with sequences of its own.", lower_bound=1)
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices of a group, which share the attention heads.", lower_bound=1)
DISPATCH = flags.DEFINE_enum("dispatch", "two_hop", ["direct", "two_hop"], "Way of a token to its experts.")
REPLICAS = flags.DEFINE_integer(
    "replicas", None, "Slots of experts in a layer, redundant ones with them; without it: the experts.", lower_bound=1
)
BOUND = cli.define_float(
    "dispatch_bound", None, "Rows of a dispatch buffer in multiples of a balanced load; without it: the worst case.", lower_bound=1.0
)
CONTEXT = flags.DEFINE_integer("context", 128, "Tokens of a prompt, and slots of the cache.", lower_bound=1)
MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 2, "Micro-batches side by side.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 1, "Sequences of a micro-batch, for a device in decoding, for a group in prefill.", lower_bound=1)
TARGET = flags.DEFINE_string("target", None, "File that describes the GPU to compile for. Without it: a CPU.")
JSON = flags.DEFINE_string("json", None, "File to write all numbers to, unrounded.")


def main() -> int:
    config = cli.read_config(CONFIG)
    devices = NODE.value * GPU.value * TENSOR.value
    check_outputs(JSON)
    if not TARGET.value and config.train.compute_dtype != "float32":  # XLA has no code for some products of bf16 on a CPU
        raise ConfigError(
            "config.train.compute_dtype", config.train.compute_dtype, "a CPU is compiled for in float32; set that, or --target"
        )
    target = prepare(TARGET.value, devices)
    from dsv3_jax.inference.unit import Unit
    from dsv3_jax.model.transformer import Execution
    from dsv3_jax.training.metrics import write_json

    described = gpu_devices(target, devices, GPU.value * TENSOR.value) if target is not None else None
    sizes: dict[str, Any] = dict(
        node=NODE.value, gpu=GPU.value, tensor=TENSOR.value, dispatch=DISPATCH.value, dispatch_bound=BOUND.value, devices=described
    )
    report = measure(Unit.of(config.model, Execution.of(config, 0), **sizes), config)
    if JSON.value:
        write_json(Path(JSON.value), report)
    print(render(report))
    return 0


def measure(unit: "Unit", config: Config) -> dict[str, Any]:
    """Figures of both programs, in bytes, seconds and counts."""
    from dsv3_jax.inference.unit import decode, prefill

    groups, count = unit.groups * ROWS.value, unit.mesh.devices.size * ROWS.value
    prompts, tokens = (MICRO_BATCHES.value, groups, CONTEXT.value), (MICRO_BATCHES.value, count)
    programs = {"prefill": _compile(prefill, unit, config, prompts, groups), "decode": _compile(decode, unit, config, tokens, count)}
    return {"devices": unit.mesh.devices.size, "platform": unit.mesh.devices.flat[0].device_kind, **programs}


def _compile(step: Any, unit: "Unit", config: Config, tokens: tuple[int, ...], rows: int) -> dict[str, Any]:
    from experiments.bench.collectives import collectives, hidden, totals
    from experiments.bench.hlo import parse
    from pallas_kernels.backend import compiling_for

    started = time.perf_counter()
    with compiling_for(unit.mesh.devices.flat[0]):
        compiled = step.lower(*_arguments(unit, config, tokens, rows), unit).compile()
    seconds, memory, program = time.perf_counter() - started, compiled.memory_analysis(), parse(compiled.as_text() or "")
    return {
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "sent_bytes": totals(collectives(program, dict(unit.mesh.shape))),
        "overlap": hidden(program)._asdict(),
    }


def _arguments(unit: "Unit", config: Config, tokens: tuple[int, ...], rows: int) -> tuple[Any, ...]:
    """Shapes of weights in the dtype of activations, router bias, tokens, a number for each sequence, and caches."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from dsv3_jax.inference.cache import init_cache
    from dsv3_jax.inference.placement import place_experts
    from dsv3_jax.inference.replicas import with_replicas
    from dsv3_jax.inference.unit import CACHE, main_model
    from dsv3_jax.model.init import init_router_bias, parameter_shapes

    dtype = config.train.compute_dtype
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), main_model(parameter_shapes(config.model)))
    if REPLICAS.value:
        load = np.ones((config.model.num_moe_layers, config.model.n_routed_experts))
        placed = place_experts(load, REPLICAS.value, config.model.n_group, unit.mesh.shape["node"], unit.mesh.devices.size)
        params = jax.eval_shape(functools.partial(with_replicas, replicas=placed), params)
    bias = jax.eval_shape(functools.partial(init_router_bias, config.model))
    cache = jax.eval_shape(functools.partial(init_cache, config.model, rows, CONTEXT.value, dtype))
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (tokens, (tokens[0], rows))]
    caches = (unit.abstract(cache, CACHE),) * tokens[0]
    return unit.abstract(params, unit.places(params)), unit.abstract(bias, P()), *unit.abstract(numbers, P()), caches


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    rows: list[tuple[str, ...]] = [(f"{report['devices']} devices: {report['platform']}", "prefill", "decode")]
    both = [report[name] for name in ("prefill", "decode")]
    rows.append(("compilation", *(f"{one['compile_seconds']:.1f} s" for one in both)))
    rows.append(("weights, cache", *(gib(one["argument_bytes"]) for one in both)))
    rows.append(("temporary", *(gib(one["temporary_bytes"]) for one in both)))
    for kind in dict.fromkeys(kind for one in both for kind in one["sent_bytes"]):
        for axis in ("node", "gpu", "tensor"):
            sent = [one["sent_bytes"].get(kind, {}).get(axis, 0) for one in both]
            rows += [(f"a device sends: {kind} over {axis}", *map(gib, sent))] if any(sent) else []
    for name, what in (("all", "all-to-alls"), ("started", "asynchronous"), ("beside_products", "with products beside them")):
        rows.append((what, *(f"{one['overlap'][name]}" for one in both)))
    return table(rows, "<>>")


if __name__ == "__main__":
    cli.run(main, keeps_programs=False)
