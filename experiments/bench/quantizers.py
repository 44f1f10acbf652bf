"""Speed of the quantizers for Hopper at sizes of training, as a share of what a copy reaches in the same run.

    uv run -m experiments.bench.quantizers

Bytes count every input and output once; times are those of the kernel alone, from CUPTI, with a cold L2. Needs a Hopper GPU.
"""

from typing import Any

from experiments import cli
from experiments.bench.timing import copy_rate, draw, kernel_seconds, require_hopper


def main() -> int:
    require_hopper()
    from pallas_kernels.quantize.hopper import PRODUCTION

    copied = copy_rate()
    print(f"copy: {copied / 1e12:.2f} TB/s, read and written\n{'kernel':<36} {'us':>9} {'TB/s':>6}  of the copy", flush=True)
    for name, shape, dtype in PRODUCTION:
        seconds, size = measure(name, shape, dtype)
        what = f"{name} {'x'.join(map(str, shape))} {dtype}"
        print(f"{what:<46} {seconds * 1e6:>9.1f} {size / seconds / 1e12:>6.2f}  {size / seconds / copied:.1%}", flush=True)
    return 0


def measure(name: str, shape: tuple[int, ...], dtype: str) -> tuple[float, int]:
    """Seconds, and bytes read and written."""
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
    elif name == "swiglu_quantize":
        operands.append(draw(1, (m,), "float32"))
    elif name == "swiglu_backward":
        operands = [draw(0, shape, "float8_e4m3fn"), scales(m, k), draw(1, (m,), "float32"), draw(2, (m, k // 2), dtype)]
        flags = (False, False)
    run = jax.jit(lambda *arrays: getattr(ops, name)(*arrays, *flags, impl="pallas"))
    outputs = jax.eval_shape(run, *operands)
    size = sum(int(jnp.dtype(x.dtype).itemsize) * x.size for x in jax.tree.leaves((operands, outputs)))
    return kernel_seconds(run, operands, cold=True), size


if __name__ == "__main__":
    cli.run(main)
