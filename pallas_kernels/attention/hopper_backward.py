"""Gradients of causal attention on Hopper GPUs (Mosaic GPU): five products for each pair of query and key, in one kernel.

A block of threads takes 128 keys of one head and goes over the queries that see them, 64 at a step. Three warpgroups:

    two of keys   64 keys each:  S^T = K Q^T,  P = exp2(S^T - log_sums),  dV += P dO,
                                 dP = V dO^T,  dS = P (dP - <dO, O>),     dK += dS Q
    one serves    TMA copies of Q, dO and two lines of numbers into `_STAGES` slots; dQ += dS^T K, which TMA adds to global memory

What decides the shape is registers. dK and dV of 64 keys are 160 a thread (192 and 128 columns), scores 32 and P 16, so that nothing is
left for dQ in their warpgroups. The third has 56 and computes dQ in passes of 32 columns. ptxas makes every wgmma wait for the one
before if they do not suffice (C7512), which takes twice the time.
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
from pallas_kernels.memory import here, tiled

Array = jax.Array

_STAGES = 2
_PASS = 32  # columns of dQ at a time
_CHUNK = 16  # queries whose lines a thread holds at a time
_REGISTERS = (224, 56)  # a thread of keys, of the server
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


# Jitted, so that it is traced once for each shape: kernels that differ in source locations alone would all be compiled.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def gradients(
    q: tuple[Array, ...],
    k: tuple[Array, ...],
    v: Array,
    gradient: Array,
    lines: Array,
    starts: Array | None,
    scale: float,
    interpret: Any = None,
) -> tuple[Array, tuple[Array, ...], Array]:
    """dQ of all parts side by side in float32, not yet scaled; the parts of dK, each for every head; dV.

    Operands as of `hopper.attention`; `gradient` [b, t, h, 64 | 128] in bfloat16, `lines` as the function of that name makes them.
    """
    sizes = sizes_of(k, v, scale, starts)
    of_documents = [] if starts is None else _documents(sizes, starts)
    of_head = (sizes.batch, sizes.length, sizes.heads)
    # Depends on an operand: else XLA makes one buffer of zeros for several layers, keeps it, and copies it for each.
    zero, _ = lax.optimization_barrier((jnp.float32(0), lines))
    dq = jax.new_ref(jnp.broadcast_to(zero, (*of_head, sizes.width)))
    out_type = tuple(jax.ShapeDtypeStruct((*of_head, width), v.dtype) for width in (*sizes.widths, sizes.v_width))
    kernel = launch("attention_backward", sizes, _body, out_type, _scratch(sizes), interpret)
    *dk, dv = kernel(*q, *k, v, gradient, lines, *of_documents, dq)
    return jax.freeze(dq), tuple(dk), dv


def lines(log_sums: Array, out: Array, gradient: Array) -> Array:
    """What a step needs of its queries, as one line: 64 `log_sums`, then 64 products of output and gradient. [b, h, steps, 128]."""
    of_rows = jnp.einsum("bthv,bthv->bht", out, gradient, preferred_element_type=jnp.float32)
    of_rows = lax.optimization_barrier(of_rows)  # XLA would compute it for each half of a line, and slowly

    def tiles(x: Array, rest: float) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % ROWS)), constant_values=rest).reshape(*x.shape[:2], -1, ROWS)

    return jnp.concatenate([tiles(log_sums, jnp.inf), tiles(of_rows, 0.0)], -1)  # queries that do not exist have P = 0


def _documents(sizes: Sizes, starts: Array) -> list[Array]:
    """`starts` of whole tiles, and of each block of keys how many queries begin no later than its first key, and than its last."""
    first = jnp.arange(sizes.blocks) * BLOCK
    # Starts never fall, so these are the first queries.
    until = [jnp.sum(starts[:, None] <= key[:, None], axis=-1, dtype=jnp.int32) for key in (first, first + BLOCK - 1)]
    return [jnp.pad(starts, ((0, 0), (0, -starts.shape[1] % ROWS)), mode="edge"), *until]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What a block of threads does: which keys of which head."""

    row: Array
    head: Array
    block: Array
    first: Array  # tile of queries that sees its keys
    steps: Array
    unmasked: Array | None  # queries, of all, that see every key of the block unless it is later, where there are documents

    @property
    def keys(self) -> Any:
        return pl.ds(self.block * BLOCK, BLOCK)

    def queries(self, n: Array) -> Any:
        return pl.ds((self.first + n) * ROWS, ROWS)


def _scratch(sizes: Sizes) -> dict[str, Any]:
    # dQ is computed in passes of 32 columns of K. Operands of one wgmma have the same swizzle: so have Q and dS.
    narrow = functools.partial(tiled, swizzle=_PASS * 2)
    return dict(
        k_slots=[narrow(1, BLOCK, width) for width in sizes.widths],
        v_slot=tiled(1, BLOCK, sizes.v_width),
        q_slots=[narrow(_STAGES, ROWS, width) for width in sizes.widths],
        gradient_slots=tiled(_STAGES, ROWS, sizes.v_width),
        line_slots=plgpu.SMEM((_STAGES, 2 * ROWS), jnp.float32),
        p_slot=tiled(1, BLOCK, ROWS),
        ds_slot=narrow(1, BLOCK, ROWS),
        dq_slot=tiled(ROWS, sizes.width // 2, dtype=jnp.float32),
        asked=plgpu.Barrier(num_arrivals=1 + len(sizes.widths)),
        filled=plgpu.Barrier(num_arrivals=2 + len(sizes.widths) + sizes.documents, num_barriers=_STAGES),
        freed=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        starts_slots=plgpu.SMEM((_STAGES, ROWS), jnp.int32),
        ready=plgpu.Barrier(num_arrivals=2),  # dS
        taken=plgpu.Barrier(),
    )


def _locate(sizes: Sizes, documents: list[Any]) -> _Unit:
    row, head, block = head_and_turn(sizes)
    first = block * (BLOCK // ROWS)
    if not documents:
        return _Unit(row, head, block, first, pl.cdiv(sizes.length, ROWS) - first, None)
    _, all_seen, last_seen = documents
    return _Unit(row, head, block, first, pl.cdiv(last_seen[row, block], ROWS) - first, all_seen[row, block])


def _body(sizes: Sizes, *operands: Any, **scratch: Any) -> None:
    parts = len(sizes.widths)
    inputs, (*dk, dv) = operands[: -parts - 1], operands[-parts - 1 :]
    q, k, (v, gradient, lines, *documents, dq) = inputs[:parts], inputs[parts : 2 * parts], inputs[2 * parts :]
    refs = dict(q=q, k=k, v=v, gradient=gradient, lines=lines, starts=documents[:1], dq=dq, dk=dk, dv=dv, **scratch)
    common = sizes, refs, _locate(sizes, documents)
    divide(_REGISTERS, functools.partial(_sum_keys, *common), functools.partial(_serve, *common))


# --- the server ---


def _serve(sizes: Sizes, refs: Any, unit: _Unit) -> None:
    for k, slot in zip(refs["k"], refs["k_slots"], strict=True):
        plgpu.copy_gmem_to_smem(window(k, unit.row, unit.keys, unit.head, slice(None)), slot.at[0], refs["asked"])
    _load(sizes, refs, unit, jnp.int32(0))
    plgpu.copy_gmem_to_smem(refs["v"].at[unit.row, unit.keys, unit.head], refs["v_slot"].at[0], refs["asked"])
    pl.when(unit.steps > 1)(lambda: _load(sizes, refs, unit, jnp.int32(1)))

    def step(n: Array, _: None) -> None:
        slot = lax.rem(n, _STAGES)
        plgpu.barrier_wait(refs["ready"])
        _add_half(sizes, refs, unit, n, 0)
        plgpu.barrier_wait(refs["freed"].at[slot])
        pl.when(n + _STAGES < unit.steps)(lambda: _load(sizes, refs, unit, n + _STAGES))
        _add_half(sizes, refs, unit, n, 1)

    lax.fori_loop(0, unit.steps, step, None)
    plgpu.wait_smem_to_gmem(0)


def _load(sizes: Sizes, refs: Any, unit: _Unit, n: Array) -> None:
    """Copies of a step's queries."""
    slot = lax.rem(n, _STAGES)
    load = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs["filled"].at[slot])
    for q, slots, width in zip(refs["q"], refs["q_slots"], sizes.widths, strict=True):
        load(window(q, unit.row, unit.queries(n), unit.head, slice(0, width)), slots.at[slot])
    load(refs["gradient"].at[unit.row, unit.queries(n), unit.head], refs["gradient_slots"].at[slot])
    load(refs["lines"].at[unit.row, unit.head, unit.first + n], refs["line_slots"].at[slot])
    for starts in refs["starts"]:
        load(starts.at[unit.row, unit.queries(n)], refs["starts_slots"].at[slot])


def _add_half(sizes: Sizes, refs: Any, unit: _Unit, n: Array, half: int) -> None:
    """Half of the columns of a step's dQ."""
    columns = sizes.width // 2
    passes = [(part, first) for part, width in enumerate(sizes.widths) for first in range(0, width, _PASS)]
    for at in range(0, columns, _PASS):
        part, first = passes[(half * columns + at) // _PASS]

        def product(acc: Any, part: int = part, first: int = first) -> Array:
            plgpu.wgmma(acc, refs["ds_slot"].at[here(n)].T, refs["k_slots"][part].at[here(n), :, pl.ds(first, _PASS)])
            return acc[...]

        dq = pl.run_scoped(product, plgpu.ACC((ROWS, _PASS), jnp.float32))
        if at == 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if half and at + _PASS == columns:
            plgpu.barrier_arrive(refs["taken"])
        refs["dq_slot"][:, at : at + _PASS] = dq
    plgpu.commit_smem()
    target = refs["dq"].at[unit.row, unit.queries(n), unit.head, pl.ds(half * columns, columns)]
    plgpu.copy_smem_to_gmem(refs["dq_slot"], target, reduction_op="add")


# --- the warpgroups of keys ---


def _sum_keys(sizes: Sizes, refs: Any, unit: _Unit, warpgroup: Array) -> None:
    """dK and dV of 64 keys."""
    own = pl.ds(warpgroup * ROWS, ROWS)
    first_key = unit.block * BLOCK + warpgroup * ROWS
    plgpu.barrier_wait(refs["asked"])

    def scope(*sums: Any) -> tuple[Array, ...]:
        *dk, dv = sums

        def step(n: Array, _: None) -> None:
            slot, zero = lax.rem(n, _STAGES), here(n)
            plgpu.barrier_wait(refs["filled"].at[slot])
            p = _probabilities(sizes, refs, unit, n, own, first_key)
            # P waits in float16, which has three bits more than bfloat16 where they count, in half of float32's registers.
            held = [lax.optimization_barrier(part.astype(jnp.float16)) for part in p]
            refs["p_slot"][0, own] = jnp.concatenate([part.astype(jnp.bfloat16) for part in p], 1)
            plgpu.commit_smem()
            plgpu.wgmma(dv, refs["p_slot"].at[zero, own], refs["gradient_slots"].at[slot])
            ds = _score_gradients(refs, n, own, held)
            pl.when(n > 0)(lambda: plgpu.barrier_wait(refs["taken"]))
            refs["ds_slot"][0, own] = ds
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs["ready"])
            for part, slots in zip(dk, refs["q_slots"], strict=True):
                plgpu.wgmma(part, ds, slots.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs["freed"].at[slot])

        lax.fori_loop(0, unit.steps, step, None)
        return tuple(part[...] for part in sums)

    accumulators = (plgpu.ACC((ROWS, columns), jnp.float32) for columns in (*sizes.widths, sizes.v_width))
    *dk, dv = pl.run_scoped(scope, *accumulators)
    refs["v_slot"][0, own] = dv.astype(jnp.bfloat16)
    plgpu.barrier_wait(refs["taken"])  # the last dQ reads all keys
    for slot, part in zip(refs["k_slots"], dk, strict=True):
        slot[0, own] = (part * sizes.scale).astype(jnp.bfloat16)
    plgpu.commit_smem()
    for slot, out in zip([*refs["k_slots"], refs["v_slot"]], [*refs["dk"], refs["dv"]], strict=True):
        plgpu.copy_smem_to_gmem(slot.at[0, own], out.at[unit.row, pl.ds(first_key, ROWS), unit.head])
    plgpu.wait_smem_to_gmem(0)


def _probabilities(sizes: Sizes, refs: Any, unit: _Unit, n: Array, own: Any, first_key: Array) -> list[Array]:
    """P, keys by queries, in chunks of queries."""

    def scope(acc: Any) -> list[Array]:
        for k, q in zip(refs["k_slots"], refs["q_slots"], strict=True):
            plgpu.wgmma(acc, k.at[here(n), own], q.at[lax.rem(n, _STAGES)].T)
        scores = acc[...]
        partly_seen = n < BLOCK // ROWS
        if unit.unmasked is not None:
            partly_seen |= (unit.first + n + 1) * ROWS > unit.unmasked
        scores = lax.cond(partly_seen, lambda: _masked(scores, refs, unit, n, first_key), lambda: scores)
        lines = [_of_queries(refs["line_slots"], n, at) for at in range(0, ROWS, _CHUNK)]
        return [jnp.exp2(part * sizes.exponent - line) for part, line in zip(_chunks(scores), lines, strict=True)]

    return pl.run_scoped(scope, plgpu.ACC((ROWS, ROWS), jnp.float32))


def _masked(scores: Array, refs: Any, unit: _Unit, n: Array, first_key: Array) -> Array:
    """Scores of the queries that see a key."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, _CHUNK), layout=plgpu.Layout.WGMMA)
    before = first_key - (unit.first + n) * ROWS  # how many of the queries see none of the keys
    masked = []
    for at, part in zip(range(0, ROWS, _CHUNK), _chunks(scores), strict=True):
        seen = iota(1) - iota(0) >= before - at
        if unit.unmasked is not None:
            seen &= iota(0) >= _of_queries(refs["starts_slots"], n, at) - first_key
        masked.append(jnp.where(seen, part, -jnp.inf))
    return jnp.concatenate(masked, 1)


def _score_gradients(refs: Any, n: Array, own: Any, p: list[Array]) -> Array:
    """dS, keys by queries, of P in chunks."""

    def scope(acc: Any) -> Array:
        plgpu.wgmma(acc, refs["v_slot"].at[here(n), own], refs["gradient_slots"].at[lax.rem(n, _STAGES)].T)
        dp = _chunks(acc[...])
        lines = [_of_queries(refs["line_slots"], n, ROWS + at) for at in range(0, ROWS, _CHUNK)]
        ds = [held.astype(jnp.float32) * (part - line) for held, part, line in zip(p, dp, lines, strict=True)]
        return jnp.concatenate([part.astype(jnp.bfloat16) for part in ds], 1)

    return pl.run_scoped(scope, plgpu.ACC((ROWS, ROWS), jnp.float32))


def _chunks(x: Array) -> list[Array]:
    return [x[:, i : i + _CHUNK] for i in range(0, ROWS, _CHUNK)]


def _of_queries(slots: Any, n: Array, at: int) -> Array:
    """Numbers of a chunk of queries, for every key."""
    line = slots.at[lax.rem(n, _STAGES), pl.ds(at, _CHUNK)]
    return lax.broadcast_in_dim(plgpu.load(line, layout=_COLUMN, optimized=False), (ROWS, _CHUNK), (1,))
