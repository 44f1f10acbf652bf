"""One Mosaic GPU kernel for every matrix product of FP8 training on Hopper, and for grouped products in bfloat16.

    out[m, n] = sum over groups g of 128 along k of  a_scale[g, m] * b_scale[g, n] * (A[m, g] . B[n, g])

Both operands have the contraction last ("K-major"), as 8-bit wgmma demands. Per K step of 128, tensor
cores sum into fresh registers; these are then scaled and added to float32 sums in registers of the CUDA cores
("promotion", V3 sec. 3.3.2, figure 7b). One producer warpgroup keeps TMA copies in flight over `stages` slots of
shared memory, one or more consumer warpgroups multiply, and every SM walks over output tiles (persistent kernel).

What keeps the tensor cores busy while the CUDA cores promote is one of two schemes, with several K steps written out:
  in turn      each warpgroup promotes when its product is done; meanwhile the tensor cores work for another one
  overlapped   it issues step k + 1 before it promotes step k
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm.consumer import consume
from pallas_kernels.gemm.kernel import Kernel
from pallas_kernels.gemm.producer import produce
from pallas_kernels.gemm.product import Product, TuningConfig, check_addend


# Jitted, so that it is traced once for each shape: kernels that differ in source locations alone would all be compiled.
@functools.partial(jax.jit, static_argnames=("product", "config", "n_groups", "sm_count", "interpret"))
def multiply(
    product: Product,
    config: TuningConfig,
    a: jax.Array,
    a_scales: jax.Array | None,
    b: jax.Array,
    b_scales: jax.Array | None,
    index: jax.Array | None = None,
    addend: jax.Array | None = None,
    *,
    n_groups: int = 1,
    sm_count: int,
    interpret: Any = None,
) -> jax.Array:
    """Runs the kernel. Shapes by `product.groups`, with steps = ceil(k / 128):

    none         a [m, k]     a_scales [steps, m]     b [n, k]     b_scales [n / 128, steps]
    rows         a [m, k]     a_scales [steps, m]     b [e, n, k]  b_scales [e, n / 128, steps]
    masked       a [e, m, k]  a_scales [e, steps, m]  b [e, n, k]  b_scales the same
    contraction  a [steps, m, 128]  a_scales [steps, m / 8, 64]  b [steps, n, 128]  b_scales [steps, n / 8, 64]
    pieces       the same; every group has as many steps

    Steps of b_scales with blocks come in whole fours. Operands of the last two, and of Wgrad without groups, have what a step
    multiplies in one piece of memory, and scales of single rows on both sides, `in_parts`.
    `index` of rows: the expert of each 128 rows, then how many of these have one (zeros follow); of masked: the rows in
    use of each expert; of contraction [e + 1]: the first 128 of k of each expert. In bfloat16 there are no scales,
    operands of "contraction" are [k, m] and [k, n], and b of rows, or masked, may be [e, k, n]. The product is added to `addend`, of
    its shape and type, in place; XLA copies an addend that is used elsewhere.
    """
    kernel = Kernel(product, config, a.shape, b.shape, n_groups, jnp.dtype(a.dtype).itemsize, addend is not None)
    if addend is not None:
        check_addend(addend, kernel.out_shape, product.out)
    operands = {name: x for name, x in zip(_OPERANDS, (a, a_scales, b, b_scales, index), strict=True) if x is not None}
    clusters: dict[str, Any] = dict(cluster=(config.cluster_size,), cluster_names=("cluster",)) if config.cluster else {}
    run = plgpu.kernel(
        functools.partial(_body, kernel, list(operands)),
        out_type=jax.ShapeDtypeStruct(kernel.out_shape, product.out) if addend is None else (),
        scratch_types=kernel.scratch(a.dtype),
        grid=(config.clusters(sm_count),),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        # Stores to shared memory are fenced by hand, in `_store`.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"{'bf16' if product.scales == 'none' else 'fp8'}_product_{product.groups}",
        **clusters,
    )
    if addend is None:
        return run(*operands.values())
    out = jax.new_ref(addend)
    run(*operands.values(), out)
    return jax.freeze(out)


_OPERANDS = ("a", "a_scales", "b", "b_scales", "index")


def _body(kernel: Kernel, names: list[str], *operands: Any, **scratch: Any) -> None:
    refs = dict(zip([*names, "out"], operands, strict=True), **scratch)
    warpgroup = lax.axis_index("warpgroup")
    consumers = kernel.config.warpgroups

    @pl.when(warpgroup == consumers)
    def _producer() -> None:
        plgpu.set_max_registers(32 if consumers == 3 else 24, action="decrease")

        @plgpu.warp_map
        def _warps(warp: jax.Array) -> None:
            pl.when(warp == 0)(lambda: produce(kernel, refs, "a"))
            pl.when(warp == 1)(lambda: produce(kernel, refs, "b"))

    @pl.when(warpgroup < consumers)
    def _consumer() -> None:
        plgpu.set_max_registers({1: 240, 2: 240, 3: 160}[consumers], action="increase")
        consume(kernel, refs, warpgroup)
