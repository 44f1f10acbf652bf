"""Products of FP8 operands with fine-grained scales (V3 sec. 3.3.2): Fprop and Dgrad, and Wgrad.

Operands are E4M3 with the contraction last, as `pallas_kernels.quantize` returns them: a and its scales from
`quantize_rows`, b from `quantize_blocks`; for Wgrad both are tiles of 128x1, each 128 tokens by themselves. `impl` is
"reference", "pallas" (Hopper) or "auto" (the kernel where there is a Hopper GPU). Any m; n in multiples of 16, or
`NotImplementedError`; operands whose k is no multiple of 128 are padded, which copies them.
"""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32

from pallas_kernels.backend import sm_count, use_pallas
from pallas_kernels.gemm import reference
from pallas_kernels.gemm.product import LINE, SWIZZLE, Product, check_addend
from pallas_kernels.gemm.tiles import choose, pieces, sizes
from pallas_kernels.parts import ROWS, Operand, in_parts

GROUP = reference.GROUP


def gemm(
    a: Float[Array, "m k"],
    a_scales: Float32[Array, "kb mp"],
    b: Float[Array, "n k"],
    b_scales: Float32[Array, "nb kb"],
    impl: str = "auto",
) -> BFloat16[Array, "m n"]:
    """`a @ b.T`: a in 1x128 tiles with scales [k / 128, rows], b in 128x128 blocks. Fprop, and Dgrad with b = W^T's rows."""
    check_operands(a, b)
    if not use_pallas(impl):
        return reference.gemm(a, a_scales, b, b_scales)
    return run(Product("block"), (a, a_scales, b, b_scales, None))


def wgrad(
    a: Float[Array, "kb m 128"],
    a_scales: Float32[Array, "kb m"] | BFloat16[Array, "kb _ 64"],
    b: Float[Array, "kb n 128"],
    b_scales: Float32[Array, "kb n"] | BFloat16[Array, "kb _ 64"],
    addend: Float32[Array, "m n"] | None = None,
    impl: str = "auto",
) -> Float32[Array, "m n"]:
    """The sum of all `a[i] @ b[i].T` (plus `addend`) in float32: x^T dy, of tiles of 128 tokens that have a scale for each column.

    Scales may come as parts, which quantizers make for an `operand`.
    """
    check_turned(a, b)
    if not use_pallas(impl):
        return reference.wgrad(a, a_scales, b, b_scales, addend)
    operands = a, a_scales, b, b_scales, None
    number = pieces(a.shape, b.shape, sm_count())
    return run(Product("row", "pieces" if number > 1 else "none", "float32"), operands, number, addend=addend)


Operands = tuple[Array, Array | None, Array, Array | None, Array | None]  # a, a_scales, b, b_scales, index of groups


def run(product: Product, operands: Operands, n_groups: int = 1, rows_together: int | None = None, addend: Array | None = None) -> Array:
    """The kernel with the tile that the model picks, on operands that it can load (see `whole_tiles`).

    Pieces are added up. The kernel adds to an addend itself, but not pieces, nor to one that lacks the rows which pad the output.
    """
    from pallas_kernels.gemm import hopper  # only here: Mosaic GPU takes a second to import, and on a CPU nobody calls it

    a, a_scales, b, b_scales, index = operands
    check_columns(b)
    rows, _, _ = sizes(product, a.shape, b.shape, n_groups)
    a, b = whole_tiles(a), whole_tiles(b)
    padded_rows, _, _ = sizes(product, a.shape, b.shape, n_groups)
    sms = sm_count()
    config = choose(product, a.shape, b.shape, sms, n_groups, rows_together)
    inside, outside = (addend, None) if rows == padded_rows and product.groups != "pieces" else (None, addend)
    if product.scales == "row":
        assert a_scales is not None and b_scales is not None
        a_scales, b_scales = _parts(a_scales, "left", config.block_m), _parts(b_scales, "right", config.block_n)
    else:
        a_scales, b_scales = _whole_lines(a_scales, config.block_m), _whole_lines(b_scales, LINE)
    out = hopper.multiply(product, config, a, a_scales, b, b_scales, index, inside, n_groups=n_groups, sm_count=sms)
    out = out[..., :rows, :]
    out = out.sum(0) if product.groups == "pieces" else out
    if outside is None:
        return out
    check_addend(outside, out.shape, product.out)
    return out + outside


def whole_tiles(x: Array) -> Array:
    """Zeros up to 8 rows and 128 bytes, the unit of TMA's tiled copies: a copy of x where it does not divide."""
    columns = -x.shape[-1] % (SWIZZLE // x.dtype.itemsize)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % 8), (0, columns)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x


def _parts(scales: Array, operand: Operand, block: int) -> Array:
    """Parts of the scales of whole tiles. Quantizers may have made them."""
    if scales.ndim == 2:
        return in_parts(_whole_lines(scales, block), operand)
    return jnp.pad(scales, [(0, 0), (0, -scales.shape[1] % (block // ROWS)), (0, 0)])


def _whole_lines[T: (Array, Array | None)](scales: T, block: int) -> T:
    """Scales of whole tiles: TMA clips tiles at the end of an array, but copies lines as they are."""
    if scales is None or scales.shape[-1] % block == 0:
        return scales
    return jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % block)])


def check_operands(a: Array, b: Array) -> None:
    """Raises ValueError unless both are FP8 and agree on the contraction."""
    _check_types(a, b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b: shapes {a.shape} and {b.shape}: the last axes, the contraction, have to be equal")


def check_turned(a: Array, b: Array) -> None:
    """Raises ValueError unless both are FP8 tiles of as many tokens, as Wgrad takes them."""
    _check_types(a, b)
    if a.ndim != 3 or b.ndim != 3 or a.shape[::2] != b.shape[::2] or a.shape[2] != GROUP:
        raise ValueError(f"a and b: shapes {a.shape} and {b.shape}: have to be [tokens / {GROUP}, columns, {GROUP}], of as many tokens")


def _check_types(a: Array, b: Array) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype.itemsize != 1:
            raise ValueError(f"{name}: dtype {x.dtype}: has to be FP8; quantize it with pallas_kernels.quantize")


def check_columns(b: Array) -> None:
    """Raises NotImplementedError where output rows are not whole 32 bytes, the least that TMA stores."""
    if b.shape[-2] % 16:
        raise NotImplementedError(f"b: shape {b.shape}: the Hopper kernel takes n in multiples of 16; pad it, or use impl='reference'")
