"""Speed of MLA decoding on Hopper over a paged latent cache in bfloat16, with its error, beside what memory allows.

    uv run -m experiments.bench.mla_decode
    uv run -m experiments.bench.mla_decode --heads=32 --tuning=64,2,1

Every sequence has the whole context, in shuffled pages; random numbers. Times are those of all kernels of a call, the
merge of stretches included, from CUPTI: medians, with a cold L2 (a large buffer is written before each). Bytes are those of
the cache, the queries and the output, each counted once; a rate of 100 % is that of a copy measured in the same run. The
error is relative, by Frobenius norm, of the first sequence against the reference in float32. Cases that do not fit into
memory are left out, and named. Needs a Hopper GPU; with --target, the description of one as experiments.bench.compile takes
it, what ptxas makes of the kernel is printed instead, which needs the `gpu` extra and no GPU.
"""

import dataclasses
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.targets import gpu_devices, read_target
from experiments.bench.timing import copy_rate, draw, kernel_seconds, require_hopper

BATCH = flags.DEFINE_list("batch", ["1", "8", "32", "128"], "Numbers of sequences, with commas between them.")
CONTEXT = flags.DEFINE_list("context", ["1024", "8192", "32768", "131072"], "Positions of a sequence, in multiples of 64.")
HEADS = flags.DEFINE_integer("heads", 128, "Query heads.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 1, "Queries of a sequence.", lower_bound=1, upper_bound=4)
SPLITS = flags.DEFINE_integer("splits", 0, "Stretches of a sequence; 0: as the model of the time picks them.", lower_bound=0)
TUNING = flags.DEFINE_list("tuning", [], "Positions of a slot, slots, blocks of scores; nothing: the default.")

TARGET = flags.DEFINE_string("target", None, "File that describes the GPU to compile for, instead of timing.")

RANK, ROPE, PAGE = 512, 64, 64
MEMORY = 0.8  # of the device's, for the cache


def main() -> int:
    cases = [(int(batch), int(context)) for batch in BATCH.value for context in CONTEXT.value]
    if TARGET.value:
        print(compiled(*cases[0], read_target(TARGET.value)))
        return 0
    require_hopper()
    room = pages_that_fit()
    largest = max((b * c // PAGE for b, c in cases if b * c // PAGE <= room), default=0)
    pool = [pages(seed, largest, columns) for seed, columns in ((0, RANK), (1, ROPE))]
    copied = copy_rate()
    print(f"copy: {copied / 1e9:.0f} GB/s; {HEADS.value} heads, {TOKENS.value} queries a sequence")
    print(f"{'batch':>5} {'context':>7} {'splits':>6} {'us':>9} {'GB/s':>6} {'of copy':>7} {'TFLOP/s':>7}  error", flush=True)
    for batch, context in cases:
        fits = batch * context // PAGE <= room
        print(line(batch, context, pool, copied) if fits else f"{batch:>5} {context:>7}  does not fit into memory", flush=True)
    return 0


def compiled(batch: int, context: int, target: str) -> str:
    """What ptxas says of the kernel of one case: registers, spills, warnings."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=folder)
        import jax

        place = jax.sharding.SingleDeviceSharding(gpu_devices(target)[0])
        pool, rows = (batch * context // PAGE, PAGE), (batch, TOKENS.value, HEADS.value)
        shapes = [(*rows, RANK + ROPE), (*pool, RANK), (*pool, ROPE), (batch, context // PAGE), (batch,)]
        dtypes = ["bfloat16"] * 3 + ["int32"] * 2
        operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in zip(shapes, dtypes, strict=True)]
        decoding(SPLITS.value or 1).trace(*operands).lower().compile()
        return "\n".join(path.read_text().strip() for path in Path(folder).glob("*.ptxas"))


def pages_that_fit() -> int:
    """Of one layer's cache in the device's memory."""
    import jax

    return int(MEMORY * (jax.devices()[0].memory_stats() or {})["bytes_limit"] / (PAGE * (RANK + ROPE) * 2))


def pages(seed: int, number: int, columns: int) -> Any:
    """A pool: random pages, repeated, since drawing all of them would take more memory than they do."""
    import jax
    import jax.numpy as jnp

    drawn = draw(seed, (min(number, 1024), PAGE, columns), "bfloat16")
    return jax.jit(lambda x: jnp.tile(x, (-(-number // len(x)), 1, 1))[:number])(drawn)


def line(batch: int, context: int, pool: list[Any], copied: float) -> str:
    """Times one case."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.backend import sm_count
    from pallas_kernels.mla_decode.sizes import TILE
    from pallas_kernels.mla_decode.splits import choose

    shape = batch, TOKENS.value, HEADS.value, RANK + ROPE
    order = jax.random.permutation(jax.random.key(2), batch * context // PAGE)
    operands = [draw(3, shape, "bfloat16"), *pool, order.reshape(batch, -1).astype(jnp.int32), jnp.full(batch, context, jnp.int32)]
    tiles = -(-TOKENS.value * HEADS.value // TILE)
    splits = SPLITS.value or choose(batch, tiles, RANK, context, sm_count())
    run = decoding(splits)
    seconds = kernel_seconds(run, operands, cold=True, of=sum)
    queries = batch * TOKENS.value * HEADS.value
    moved = 2 * (batch * context * (RANK + ROPE) + queries * (RANK + ROPE + RANK))
    rate, flops = moved / seconds, 2 * queries * context * (RANK + ROPE + RANK) / seconds
    return (
        f"{batch:>5} {context:>7} {splits:>6} {seconds * 1e6:>9.1f} {rate / 1e9:>6.0f} {rate / copied:>7.1%} {flops / 1e12:>7.0f}"
        f"  {error(run, operands):.2e}"
    )


def decoding(splits: int) -> Any:
    """The operation, to be called or lowered."""
    import jax

    from pallas_kernels.mla_decode import run
    from pallas_kernels.mla_decode.sizes import DEFAULT

    fields: Any = zip(("block", "stages", "score_slots"), map(int, TUNING.value), strict=False)
    config = dataclasses.replace(DEFAULT, **dict(fields))
    return jax.jit(functools.partial(run, scale=(128 + ROPE) ** -0.5, splits=splits, config=config))


def error(run: Any, operands: list[Any]) -> float:
    """Relative error of the first sequence."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_decode import reference

    q, c_kv, k_r, table, lengths = operands
    exact = jax.jit(functools.partial(reference.mla_decode, scale=(128 + ROPE) ** -0.5))
    expected = exact(q[:1].astype(jnp.float32), c_kv, k_r, table[:1], lengths[:1])
    difference = run(*operands)[:1].astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


if __name__ == "__main__":
    cli.run(main)
