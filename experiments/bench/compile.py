"""Compiles the train step of a configuration for its whole mesh, without weights and without its devices.

    uv run -m experiments.bench.compile --config=configs/tiny.py --config.parallel.mesh.node=2 --config.parallel.mesh.gpu=4
    uv run -m experiments.bench.compile --config=configs/v3_671b.py --config.parallel.mesh.data=1 \\
        --config.parallel.mesh.node=8 --config.parallel.mesh.gpu=8 --config.parallel.dispatch=two_hop \\
        --config.parallel.dispatch_bound=1.25 --config.parallel.shard=parameters --config.train.micro_batch_size=64 \\
        --config.data.num_shards=64

Prints the time that lowering and compiling take, the memory of a device by XLA's own analysis beside what
experiments.describe estimates, and the bytes that a device sends for one micro-batch. A CPU is compiled for as if it were
so many devices; its expensive passes are off, and so is the one that widens bf16, because nothing is run. With --target,
the description of a GPU (XLA's GpuTargetConfigProto as text), it is compiled for GPUs, with the kernels that they would run, and
collectives that run beside computation are counted; that needs the `gpu` extra and no GPU.
"""

import time
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import Config
from experiments import cli
from experiments.bench.targets import gpu_devices, prepare
from experiments.output import check_outputs, gib, table

CONFIG = cli.define_config()
TARGET = flags.DEFINE_string("target", None, "File that describes the GPU to compile for. Without it: a CPU.")
HLO = flags.DEFINE_string("hlo", None, "File to write the compiled program to.")
JSON = flags.DEFINE_string("json", None, "File to write all numbers to, unrounded.")


def main() -> int:
    config = cli.read_config(CONFIG)
    check_outputs(HLO, JSON)
    target = prepare(TARGET.value, config.parallel.mesh.devices)
    from dsv3_jax.training.metrics import write_atomically, write_json

    report, text = measure(config, target)
    if HLO.value:
        write_atomically(Path(HLO.value), text.encode())
    if JSON.value:
        write_json(Path(JSON.value), report)
    print(render(report))
    return 0


def measure(config: Config, target: str | None = None) -> tuple[dict[str, Any], str]:
    """All numbers, bytes and seconds without a prefix, and the compiled program."""
    import resource

    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training.accounting import device_memory
    from dsv3_jax.training.lowered import lower_train_step
    from experiments.bench.collectives import collectives, hidden, totals
    from experiments.bench.hlo import parse

    sizes = config.parallel.mesh
    mesh = make_mesh(sizes, gpu_devices(target, sizes.devices, sizes.gpu) if target else None)
    started = time.perf_counter()
    lowered = lower_train_step(config, mesh)
    lower_seconds, started = time.perf_counter() - started, time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    program = parse(text)
    return {
        "devices": mesh.devices.size,
        "platform": mesh.devices.flat[0].device_kind,
        "lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "estimate": {item.kind: item.per_device for item in device_memory(config)},
        "sent_bytes": totals(collectives(program, dict(mesh.shape))),
        "overlap": hidden(program)._asdict(),
    }, text


def render(report: dict[str, Any]) -> str:
    """The report as text, a table a topic."""
    return "\n\n".join([_compilation(report), _memory(report), _sent(report)])


def _compilation(report: dict[str, Any]) -> str:
    overlap = report["overlap"]
    rows = [
        ("train step", f"compiled for {report['devices']} devices: {report['platform']}"),
        ("lowering", f"{report['lower_seconds']:.1f} s"),
        ("compilation", f"{report['compile_seconds']:.1f} s"),
        ("host memory", f"{gib(report['host_peak_bytes'])} at its peak"),
        ("asynchronous all-to-all", f"{overlap['started']} of {overlap['all']}; {overlap['beside_products']} with products beside them"),
        ("of an overlapped pair", f"{overlap['beside_other_pass']} of these with products of the other pass beside them"),
    ]
    return table(rows, "<<")


def _memory(report: dict[str, Any]) -> str:
    estimate = report["estimate"]
    state = {kind: estimate[kind] for kind in ("master", "moments")}
    rest = {kind: size for kind, size in estimate.items() if kind not in state}
    rows = [
        ("memory of a device", "compiled", "describe", "which is"),
        ("arguments", gib(report["argument_bytes"]), gib(sum(state.values())), " + ".join(state)),
        ("outputs, not in place", gib(report["output_bytes"] - report["aliased_bytes"]), gib(0), ""),
        ("temporary", gib(report["temporary_bytes"]), gib(sum(rest.values())), " + ".join(kind for kind in rest if rest[kind])),
    ]
    return table(rows, "<>><")


def _sent(report: dict[str, Any]) -> str:
    sent = report["sent_bytes"]
    axes = [axis for axis in ("pipe", "data", "node", "gpu") if any(axis in by_axis for by_axis in sent.values())]
    rows = [("a device sends, one micro-batch", *axes)]
    rows += [(kind, *(gib(by_axis.get(axis, 0)) for axis in axes)) for kind, by_axis in sent.items()]
    return table(rows, "<" + ">" * len(axes))


if __name__ == "__main__":
    cli.run(main, keeps_programs=False)
