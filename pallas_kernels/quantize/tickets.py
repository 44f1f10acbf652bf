"""Tiles that warpgroups take when they are ready for them: a counter in memory says which is next.

Multiprocessors are not equally far from memory. With as many tiles for each, an H200's first ends 28 % sooner than its last, and
half of all have nothing to do for the last sixth of the time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Int32

from pallas_kernels.quantize.ptx import address, asm, place_in_warpgroup, word

_SCALAR = plgpu.Layout.WG_SPLAT(())


def counter() -> Any:
    """For the tiles of one call."""
    return jax.new_ref(jnp.zeros((1,), jnp.int32))


def take(counter: Any) -> Int32[Array, ""]:
    """The next number of the counter. One thread has it, and waits for memory when it uses it: in `publish`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR))
    def ticket_taken(_: Any, counter: Any) -> Any:
        text = "{ .reg .pred p; setp.eq.u32 p, $2, 0; @p atom.global.relaxed.gpu.add.u32 $0, [$1], 1; @!p mov.u32 $0, 0; }"
        taken = asm(text, 1, [address(counter, 64), _not_the_taker()])[0]
        return mgpu.FragmentedArray.splat(taken, (), is_signed=True)

    return ticket_taken(counter)


def publish(ref: Any, ticket: Int32[Array, ""]) -> None:
    """Puts what `take` gave the warpgroup into shared memory [1]. All need a barrier before they read it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))
    def ticket_published(_: Any, ref: Any, ticket: Any) -> None:
        text = "{ .reg .pred p; setp.eq.u32 p, $2, 0; @p st.shared.b32 [$0], $1; }"
        asm(text, 0, [address(ref), ticket.registers.item(), _not_the_taker()])

    ticket_published(ref, ticket)


def _not_the_taker() -> Any:
    """0 in the first thread of the last warp, which has no copies to start."""
    lane, warp = place_in_warpgroup()
    return arith.ori(lane, arith.xori(warp, word(3)))
