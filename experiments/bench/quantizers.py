"""Speed of the quantizers for Hopper at sizes of training, as a share of what a copy reaches in the same run.

    uv run -m experiments.bench.quantizers

Bytes count every input and output once, rows that are gathered several times too; times are those of the kernel alone, from
CUPTI, back to back and with a cold L2, which first writes back what cleared it. Each time stands beside that of an XLA copy of
as many bytes, timed in the same way, and the rate of a large copy in a loop, by the host's clock, is printed first. Needs a
Hopper GPU.
"""

from collections.abc import Callable
from typing import Any

from experiments import cli
from experiments.bench.timing import copy_rate, draw, kernel_seconds, require_hopper


def main() -> int:
    require_hopper()
    from pallas_kernels.quantize.hopper import PRODUCTION

    copied = copy_rate()
    heading = f"{'us, cold':>9} {'TB/s':>6} {'of a copy':>10} {'us, warm':>9} {'TB/s':>6} {'of a copy':>10} {'of the loop':>12}"
    print(f"copy in a loop: {copied / 1e12:.2f} TB/s, read and written\n{'kernel':<46} {heading}", flush=True)
    for name, shape, dtype in PRODUCTION:
        run, operands, size = prepared(name, shape, dtype)
        line = f"{f'{name} {"x".join(map(str, shape))} {dtype}':<46}"
        for cold in (True, False):
            seconds = kernel_seconds(run, operands, cold=cold)
            line += f" {seconds * 1e6:>9.1f} {size / seconds / 1e12:>6.2f} {copy_seconds(size, cold) / seconds:>10.1%}"
        print(f"{line} {size / seconds / copied:>12.1%}", flush=True)
    return 0


def copy_seconds(size: int, cold: bool) -> float:
    """Of a kernel of XLA's that reads half of so many bytes and writes the other half."""
    return kernel_seconds(lambda x: x + 1, [draw(0, (size // 8,), "float32")], cold)


def prepared(name: str, shape: tuple[int, ...], dtype: str) -> tuple[Callable[..., Any], list[Any], int]:
    """A call, its operands, and how many bytes are read and written."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import quantize as ops

    m, k = shape[-2:]
    scales = lambda rows, columns: draw(3, (-(-columns // 128), -(-rows // 128) * 128), "float32")  # noqa: E731
    operands: list[Any] = [draw(0, shape, dtype)]
    flags: tuple[bool, ...] = (False,)
    if name in ("quantize_blocks", "quantize_and_keep"):
        flags = ()
    elif name == "retile":
        operands.append(scales(m, k))
    elif name == "gather_and_retile":  # each token eight times, in any order, and some rows of zeros, as of eight experts of 64
        rows = 8 * m + 16384
        source = jax.random.permutation(jax.random.key(4), jnp.arange(rows) // 8)
        operands += [scales(rows, k), source.clip(max=m).astype(jnp.int32)]
        flags = (False, True)
    elif name == "swiglu_quantize":
        operands.append(draw(1, (m,), "float32"))
    elif name == "swiglu_backward":
        operands = [draw(0, shape, "float8_e4m3fn"), scales(m, k), draw(1, (m,), "float32"), draw(2, (m, k // 2), dtype)]
        flags = (False, False)
    run = jax.jit(lambda *arrays: getattr(ops, name)(*arrays, *flags, impl="pallas"))
    outputs = jax.eval_shape(run, *operands)
    size = sum(int(jnp.dtype(x.dtype).itemsize) * x.size for x in jax.tree.leaves((operands, outputs)))
    return run, operands, size


if __name__ == "__main__":
    cli.run(main)
