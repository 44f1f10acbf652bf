"""How the benchmarks measure: medians of many calls on random data, and the rate that the machine reaches at its best."""

import time
from collections.abc import Callable
from typing import Any


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square product on random data: the hardware limit that utilisation is held against."""
    import jax

    n = 1536 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    return 2 * n**3 / median_seconds(jax.jit(lambda x, y: x @ y), a, b)


def copy_rate() -> float:
    """Bytes a second that a pass over a large array reads and writes: the limit of what moves memory only."""
    import jax
    import jax.numpy as jnp

    # In place: where memory is fresh, a CPU would spend most of the time on page faults.
    passes, x = 16, jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**28, jnp.float32)
    run, seconds = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x), donate_argnums=0), []
    for _ in range(5):
        started = time.perf_counter()
        x = jax.block_until_ready(run(x))
        seconds.append((time.perf_counter() - started) / passes)
    return 2 * x.nbytes / min(seconds)


def median_seconds(f: Callable[..., Any], *arguments: Any, repeats: int = 20) -> float:
    """Median time of a call, in batches of five so that dispatch does not count; the first batches warm up."""
    import jax
    import numpy as np

    seconds = []
    for _ in range(repeats // 5 + 2):
        started = time.perf_counter()
        jax.block_until_ready([f(*arguments) for _ in range(5)])
        seconds.append((time.perf_counter() - started) / 5)
    return float(np.median(seconds[2:]))


def require_hopper() -> None:
    """Raises ConfigError without a Hopper GPU."""
    import jax

    from dsv3_jax.config import ConfigError
    from pallas_kernels.backend import is_hopper

    if not is_hopper():
        raise ConfigError("device", jax.devices()[0].device_kind, "the kernels need a Hopper GPU (H100 or H200)")


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> Any:
    """Normal numbers, or positive ones for scales (float32)."""
    import jax
    import jax.numpy as jnp

    key = jax.random.key(seed)
    if dtype == "float32":
        return jax.random.uniform(key, shape, minval=0.5, maxval=2)
    return jax.jit(lambda: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype))()


def kernel_seconds(
    run: Callable[..., Any], operands: list[Any], cold: bool, repeats: int = 9, of: Callable[[list[float]], float] = max
) -> float:
    """Median time on the GPU of the longest kernel of a call, which is the product, or `of` all; cold: after a write of a gigabyte."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.mosaic.gpu import profiler

    def after_clearing(*operands: Any) -> Any:
        *others, last = operands  # that one waits is enough, and the others may be large
        last, cleared = jax.lax.optimization_barrier((last, jnp.zeros(2**28, jnp.float32)))
        return run(*others, last), cleared

    timed: Any = profiler.measure(jax.jit(after_clearing if cold else run), aggregate=False, iterations=repeats)
    _, calls = timed(*operands)
    return float(np.median([of([ms for name, ms in call if "broadcast" not in name]) for call in calls])) / 1e3
