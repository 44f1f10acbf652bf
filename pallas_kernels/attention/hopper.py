"""Causal attention on Hopper GPUs (Mosaic GPU), with what its gradients need of it.

A block of threads takes 128 queries of one head and goes over the keys that they see, 128 at a step, the last ones first. Three warpgroups:

    two of queries  64 queries each:  S = Q K^T,  P = exp2(S - largest),  O = O exp2(largest before - largest) + P V
    one loads       TMA copies of Q, then of K and V into `_STAGES` slots

S of a step is issued before P V of the last one, so that its softmax runs beside that product, and the two warpgroups take turns to issue,
so that one is at its softmax while the tensor cores have products of the other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.blocks import BLOCK, ROWS, Sizes, divide, head_and_turn, launch, sizes_of, window
from pallas_kernels.memory import tiled

Array = jax.Array

_KEYS = BLOCK  # of a step: as many as queries, so that the first step alone has keys that some of them do not see
_PIECE = 64  # columns of a query
_STAGES = 2
_ROW = plgpu.Layout.WGMMA.reduce(1)
_REGISTERS = (240, 24)  # a thread of queries, of the loader


# Jitted, so that it is traced once for each shape: kernels that differ in source locations alone would all be compiled.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attention(
    q: tuple[Array, ...], k: tuple[Array, ...], v: Array, starts: Array | None, scale: float, interpret: Any = None
) -> tuple[Array, Array]:
    """The output, and log2 of the sums of exponentials, [b, h, t up to a multiple of 128].

    Parts of q [b, t, h, n or more] and of k [b, t, h, n] or [b, t, n], with n = 64, 128 or 192; v [b, t, h, 64 | 128]; in bfloat16. t: a
    multiple of eight. starts [b, t] in int32: the first key that a query sees, never falling along a row; None: all see the first.
    """
    sizes = sizes_of(k, v, scale, starts)
    of_documents = [] if starts is None else [jnp.pad(starts, ((0, 0), (0, -starts.shape[1] % BLOCK)), mode="edge")]
    sums = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.blocks * BLOCK), jnp.float32)
    out = jax.ShapeDtypeStruct(v.shape, v.dtype)
    return launch("attention", sizes, _body, (out, sums), _scratch(sizes), interpret)(*q, *k, v, *of_documents)


def _scratch(sizes: Sizes) -> dict[str, Any]:
    slots: dict[str, Any] = dict(num_barriers=_STAGES)
    return dict(
        # The output leaves by the same slots.
        q_slots=[tiled(BLOCK, _PIECE) for _ in range(0, max(sizes.width, sizes.v_width), _PIECE)],
        k_slots=[tiled(_STAGES, _KEYS, width) for width in sizes.widths],
        v_slots=tiled(_STAGES, _KEYS, sizes.v_width),
        sums_slot=plgpu.SMEM((BLOCK,), jnp.float32),
        starts_slot=plgpu.SMEM((BLOCK,), jnp.int32),
        asked=plgpu.Barrier(num_arrivals=sizes.width // _PIECE + sizes.documents),
        k_filled=plgpu.Barrier(num_arrivals=len(sizes.widths), **slots),
        v_filled=plgpu.Barrier(**slots),
        k_freed=plgpu.Barrier(num_arrivals=2, **slots),
        v_freed=plgpu.Barrier(num_arrivals=2, **slots),
        turns=plgpu.Barrier(num_barriers=2),
    )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What a block of threads does: which queries of which head."""

    row: Array
    head: Array
    block: Array
    steps: Array
    last_start: Any  # the first key that all queries see, None without documents

    @property
    def queries(self) -> Any:
        return pl.ds(self.block * BLOCK, BLOCK)

    def first_key(self, n: Array) -> Array:
        return (self.block - n) * _KEYS


def _locate(sizes: Sizes, documents: list[Any]) -> _Unit:
    row, head, turn = head_and_turn(sizes)
    block = sizes.blocks - 1 - turn
    if not documents:
        return _Unit(row, head, block, block + 1, None)
    (starts,) = documents
    first, last = (starts[row, block * BLOCK + query] for query in (0, BLOCK - 1))
    return _Unit(row, head, block, block + 1 - lax.div(first, _KEYS), last)


def _body(sizes: Sizes, *operands: Any, **scratch: Any) -> None:
    parts = len(sizes.widths)
    q, k, (v, *starts, out, sums) = operands[:parts], operands[parts : 2 * parts], operands[2 * parts :]
    refs = dict(q=q, k=k, v=v, starts=starts, out=out, sums=sums, **scratch)
    common = sizes, refs, _locate(sizes, starts)
    divide(_REGISTERS, functools.partial(_attend, *common), functools.partial(_load, *common))


def _pieces(sizes: Sizes) -> list[tuple[int, Any]]:
    """Part and columns of each piece of a query."""
    return [(part, pl.ds(first, _PIECE)) for part, width in enumerate(sizes.widths) for first in range(0, width, _PIECE)]


def _load(sizes: Sizes, refs: Any, unit: _Unit) -> None:
    for slot, (part, columns) in zip(refs["q_slots"], _pieces(sizes), strict=False):
        plgpu.copy_gmem_to_smem(window(refs["q"][part], unit.row, unit.queries, unit.head, columns), slot, refs["asked"])
    for starts in refs["starts"]:
        plgpu.copy_gmem_to_smem(starts.at[unit.row, unit.queries], refs["starts_slot"], refs["asked"])

    def step(n: Array, _: None) -> None:
        slot, keys = lax.rem(n, _STAGES), pl.ds(unit.first_key(n), _KEYS)
        pl.when(n >= _STAGES)(lambda: plgpu.barrier_wait(refs["k_freed"].at[slot]))
        for k, slots in zip(refs["k"], refs["k_slots"], strict=True):
            plgpu.copy_gmem_to_smem(window(k, unit.row, keys, unit.head, slice(None)), slots.at[slot], refs["k_filled"].at[slot])
        pl.when(n >= _STAGES)(lambda: plgpu.barrier_wait(refs["v_freed"].at[slot]))
        plgpu.copy_gmem_to_smem(refs["v"].at[unit.row, keys, unit.head], refs["v_slots"].at[slot], refs["v_filled"].at[slot])

    lax.fori_loop(0, unit.steps, step, None)


# --- the warpgroups of queries ---


def _attend(sizes: Sizes, refs: Any, unit: _Unit, warpgroup: Array) -> None:
    """Outputs of 64 queries, by the online softmax (2307.08691, algorithm 1)."""
    own = _own(warpgroup)
    plgpu.barrier_wait(refs["asked"])
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(refs["turns"].at[0]))

    def scope(out: Any) -> tuple[Array, Array, Array]:
        starts = plgpu.load(refs["starts_slot"].at[own], layout=_ROW, optimized=False) if sizes.documents else None
        carry = _first_step(sizes, refs, unit, warpgroup, starts)
        step = functools.partial(_step, sizes, refs, unit, warpgroup, starts, out)
        largest, total, p = lax.fori_loop(1, unit.steps, step, carry)
        last = lax.rem(unit.steps - 1, _STAGES)
        plgpu.barrier_wait(refs["v_filled"].at[last])
        plgpu.wgmma(out, p, refs["v_slots"].at[last])
        return out[...], largest, total

    out, largest, total = pl.run_scoped(scope, plgpu.ACC((ROWS, sizes.v_width), jnp.float32))
    _store(refs, unit, warpgroup, own, (out * _spread(1.0 / total, out)).astype(jnp.bfloat16), largest + jnp.log2(total))
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(refs["turns"].at[0]))  # that the other gave when it was done
    plgpu.wait_smem_to_gmem(0)


def _first_step(sizes: Sizes, refs: Any, unit: _Unit, warpgroup: Array, starts: Array | None) -> tuple[Array, Array, Array]:
    """Largest exponents, sums of exponentials and P, of the queries' own block of keys."""

    def scope(acc: Any) -> Array:
        plgpu.barrier_wait(refs["k_filled"].at[0])
        _score(sizes, refs, warpgroup, 0, acc)
        return acc[...]

    scores = pl.run_scoped(scope, _accumulator())
    plgpu.barrier_arrive(refs["k_freed"].at[0])
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    scores = jnp.where(iota(0) - iota(1) >= -warpgroup * ROWS, scores, -jnp.inf)
    if starts is not None:
        scores = _masked(scores, starts - unit.first_key(jnp.int32(0)))
    largest = scores.max(1) * sizes.exponent
    p = jnp.exp2(scores * sizes.exponent - _spread(largest, scores))
    return largest, p.sum(1), p.astype(jnp.bfloat16)


def _step(
    sizes: Sizes, refs: Any, unit: _Unit, warpgroup: Array, starts: Array | None, out: Any, n: Array, carry: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """The scores of step n, beside the output of the step before."""
    largest, total, p = carry
    slot, before = lax.rem(n, _STAGES), lax.rem(n - 1, _STAGES)

    def scope(acc: Any) -> Array:
        plgpu.barrier_wait(refs["k_filled"].at[slot])
        plgpu.barrier_wait(refs["turns"].at[warpgroup])
        _score(sizes, refs, warpgroup, slot, acc)
        plgpu.barrier_wait(refs["v_filled"].at[before])
        plgpu.wgmma(out, p, refs["v_slots"].at[before])
        plgpu.barrier_arrive(refs["turns"].at[1 - warpgroup])
        return plgpu.wgmma_accumulator_load(acc, wait_n=1)

    scores = pl.run_scoped(scope, _accumulator())
    plgpu.barrier_arrive(refs["k_freed"].at[slot])
    if starts is not None:
        first_key = unit.first_key(n)
        scores = lax.cond(first_key < unit.last_start, lambda: _masked(scores, starts - first_key), lambda: scores)
    new = jnp.maximum(largest, scores.max(1) * sizes.exponent)
    p = jnp.exp2(scores * sizes.exponent - _spread(new, scores))
    shrink = jnp.exp2(largest - new)
    total = total * shrink + p.sum(1)
    so_far = plgpu.wgmma_accumulator_load(out, wait_n=0)
    plgpu.barrier_arrive(refs["v_freed"].at[before])
    out[...] = so_far * _spread(shrink, so_far)
    return new, total, p.astype(jnp.bfloat16)


def _accumulator() -> Any:
    return plgpu.ACC((ROWS, _KEYS), jnp.float32)


def _score(sizes: Sizes, refs: Any, warpgroup: Array, slot: Array | int, acc: Any) -> None:
    own = _own(warpgroup)
    for q, (part, columns) in zip(refs["q_slots"], _pieces(sizes), strict=False):
        plgpu.wgmma(acc, q.at[own], refs["k_slots"][part].at[slot, :, columns].T)


def _masked(scores: Array, firsts: Array) -> Array:
    """Scores of keys from the one of its row on."""
    columns = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(columns >= _spread(firsts, scores), scores, -jnp.inf)


def _own(warpgroup: Array) -> Any:
    """The rows of a warpgroup."""
    return pl.ds(warpgroup * ROWS, ROWS)


def _spread(rows: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(rows, like.shape, (0,))


def _store(refs: Any, unit: _Unit, warpgroup: Array, own: Any, out: Array, log_sums: Array) -> None:
    queries = pl.ds(unit.block * BLOCK + warpgroup * ROWS, ROWS)
    pieces = [pl.ds(first, _PIECE) for first in range(0, out.shape[1], _PIECE)]
    for slot, columns in zip(refs["q_slots"], pieces, strict=False):
        slot[own] = out[:, columns.start : columns.start + _PIECE]
    refs["sums_slot"][own] = log_sums
    plgpu.commit_smem()
    for slot, columns in zip(refs["q_slots"], pieces, strict=False):
        plgpu.copy_smem_to_gmem(slot.at[own], refs["out"].at[unit.row, queries, unit.head, columns])
    plgpu.copy_smem_to_gmem(refs["sums_slot"].at[own], refs["sums"].at[unit.row, unit.head, queries])
