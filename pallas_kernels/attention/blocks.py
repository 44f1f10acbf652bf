"""What both kernels share: sizes, which head a block of threads has, and how its three warpgroups divide the work."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array

ROWS = 64  # queries or keys of a warpgroup
BLOCK = 2 * ROWS  # of a block of threads
_SERVER = 2  # warpgroup
_TOGETHER = 8  # heads: as many as L2 holds


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Queries and keys come in parts that lie by themselves: contents, and in MLA what is rotated, of which all heads share the keys."""

    batch: int
    length: int
    heads: int
    widths: tuple[int, ...]  # columns of each part of queries and keys
    v_width: int
    scale: float  # of scores, positive
    documents: bool  # whether a query sees no key before one that `starts` names

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def blocks(self) -> int:
        """Of threads, for one head."""
        return pl.cdiv(self.length, BLOCK)

    @property
    def exponent(self) -> float:
        """`scale` where exponentials are powers of two, for which there is an instruction."""
        return self.scale * math.log2(math.e)


def sizes_of(k: tuple[Array, ...], v: Array, scale: float, starts: Array | None) -> Sizes:
    """Of keys in parts and values [b, t, h, n]."""
    batch, length, heads, v_width = v.shape
    return Sizes(batch, length, heads, tuple(part.shape[-1] for part in k), v_width, scale, starts is not None)


def launch(name: str, sizes: Sizes, body: Callable, out_type: Any, scratch: dict[str, Any], interpret: Any) -> Callable:
    """The kernel, for every block of every head; `body` is called with `sizes` and the operands."""
    return plgpu.kernel(
        functools.partial(body, sizes),
        out_type=out_type,
        scratch_types=scratch,
        grid=(sizes.batch * sizes.heads * sizes.blocks,),
        grid_names=("unit",),
        num_threads=3,
        thread_name="warpgroup",
        # Stores to shared memory are fenced by hand.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name=name,
    )


def divide(registers: tuple[int, int], work: Callable[[Array], None], serve: Callable[[], None]) -> None:
    """Two warpgroups `work`, each called with its number, the third serves them; `registers` of a thread of each kind.

    Registers of all three add up to 504 at most, what they start with: a kernel that asks for more waits for ever.
    """
    warpgroup = lax.axis_index("warpgroup")
    of_work, of_server = registers

    @pl.when(warpgroup == _SERVER)
    def _server() -> None:
        plgpu.set_max_registers(of_server, action="decrease")
        serve()

    @pl.when(warpgroup != _SERVER)
    def _workers() -> None:
        plgpu.set_max_registers(of_work, action="increase")
        work(warpgroup)


def head_and_turn(sizes: Sizes) -> tuple[Array, Array, Array]:
    """Row and head of a block of threads, and which of the head's blocks it is, if those that take longest come first.

    Some heads take turns, so that their blocks, but for the first, find keys or queries in L2, and all end at about the same time.
    """
    together = math.gcd(sizes.batch * sizes.heads, _TOGETHER)
    unit, of_group = lax.axis_index("unit"), sizes.blocks * together
    group, within = lax.div(unit, of_group), lax.rem(unit, of_group)
    head = group * together + lax.rem(within, together)
    return lax.div(head, sizes.heads), lax.rem(head, sizes.heads), lax.div(within, together)


def window(ref: Any, row: Any, positions: Any, head: Any, columns: Any) -> Any:
    """A tile of one head, or of all heads if they share it."""
    return ref.at[row, positions, columns] if len(ref.shape) == 3 else ref.at[row, positions, head, columns]
