"""SwiGLU and its gradient with the quantization of what comes out, on Hopper GPUs (Mosaic GPU)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import here, whole_rows
from pallas_kernels.quantize.arithmetic import (
    SHORT,
    as_float,
    computed_quotient,
    keys_of,
    largest_of,
    opened,
    quantize_computed,
    quantize_known,
    quantize_lines,
    unsigned,
)
from pallas_kernels.quantize.instructions import fence, meet, reciprocal, widened
from pallas_kernels.quantize.pieces import load_of_rows, load_pieces, of_rows, store_columns, store_pieces, turn
from pallas_kernels.quantize.reference import BLOCK, E4M3, swiglu_operands
from pallas_kernels.quantize.tickets import counter, publish, take
from pallas_kernels.quantize.tiles import (
    LINE,
    QUARTER,
    QUARTERS,
    as_operand,
    at_block,
    at_quarter,
    check_halves,
    in_one_warp,
    launch,
    load_all,
    load_rows,
    of_columns,
    once,
    padded,
    scale_of_columns,
    start_all,
    store_all,
    tile_of,
    wait_for_stores,
    whole_columns,
)

Array = jax.Array


@once
def swiglu_quantize(hidden: Array, gates: Array | None, power_of_two: bool, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.swiglu_quantize`."""
    rows, hidden = hidden.shape[0], whole_rows(hidden)
    m, f = hidden.shape[0], hidden.shape[1] // 2
    check_halves("hidden", f)
    blocks, mp = f // BLOCK, padded(m)
    inputs = (hidden,) if gates is None else (hidden, jnp.pad(gates, (0, mp - rows)))
    values, scales, hidden_values, hidden_scales = launch(
        functools.partial(_swiglu_body, power_of_two=power_of_two),
        "swiglu_quantize",
        grid=(mp // QUARTER, blocks),
        out=dict(
            values=((m, f), E4M3),
            scales=((blocks, mp), jnp.float32),
            hidden_values=((m, 2 * f), E4M3),
            hidden_scales=((2 * blocks, mp), jnp.float32),
        ),
        scratch=dict(
            hidden_s=tile_of(hidden.dtype, 2, QUARTER, BLOCK),
            gates_s=plgpu.SMEM((QUARTER,), jnp.float32),
            values_s=tile_of(E4M3, 3, QUARTER, BLOCK),
            scales_s=plgpu.SMEM((3, QUARTER), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=1 + len(inputs)),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs)
    return values[:rows], scales, hidden_values[:rows], hidden_scales


def _swiglu_body(hidden, *refs, hidden_s, gates_s, values_s, scales_s, loaded, power_of_two):
    *gates, values, scales, hidden_values, hidden_scales = refs
    i, j, blocks = lax.axis_index("row"), lax.axis_index("column"), scales.shape[0]
    rows = at_quarter(i)
    load_all(
        [(hidden.at[rows, at_block(j)], hidden_s.at[0]), (hidden.at[rows, at_block(blocks + j)], hidden_s.at[1])]
        + [(g.at[rows], gates_s) for g in gates],
        loaded,
    )
    (gate, layout), (up, _) = (load_rows(hidden_s.at[half]) for half in (0, 1))
    act = gate * _sigmoid(gate * (1 / _UNIT), layout) * up
    factor = plgpu.load(gates_s, layout=layout.reduce(1)) if gates else None
    values_s[0], scales_s[0] = quantize_computed(act, layout, power_of_two, factor)
    for side, lines in enumerate((gate, up)):
        values_s[1 + side], scales_s[1 + side] = quantize_lines(lines, layout, False, SHORT)
    store_all(
        [(values_s.at[0], values.at[rows, at_block(j)]), (scales_s.at[0], scales.at[j, rows])]
        + [(values_s.at[1 + half], hidden_values.at[rows, at_block(half * blocks + j)]) for half in (0, 1)]
        + [(scales_s.at[1 + half], hidden_scales.at[half * blocks + j, rows]) for half in (0, 1)]
    )


@once
def swiglu_backward(
    hidden: Array,
    scales: Array,
    gates: Array | None,
    d_act: Array,
    power_of_two: bool,
    act_power_of_two: bool,
    parts: bool,
    sm_count: int,
    interpret: Any = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array | None]:
    """See `pallas_kernels.quantize.swiglu_backward`."""
    rows, hidden, d_act = d_act.shape[0], whole_rows(hidden), whole_rows(d_act)
    m, f = d_act.shape
    check_halves("hidden", f)
    blocks, mp = f // BLOCK, padded(m)
    scales = scales.reshape(2, blocks, mp)  # so that those of gate and up are one copy
    inputs = (hidden, scales, d_act) if gates is None else (hidden, scales, d_act, jnp.pad(gates, (0, mp - rows)))
    operands = swiglu_operands(parts)
    of_tensors = (power_of_two, operands[0]), (power_of_two, operands[0]), (act_power_of_two, operands[1])
    values, scales, values_t, scales_t, act_values_t, act_scales_t, d_gates = launch(
        functools.partial(_backward_body, of_tensors=of_tensors),
        "swiglu_backward",
        grid=(min(sm_count, mp // BLOCK * blocks),),
        grid_names=("sm",),
        out=dict(
            values=((m, 2 * f), E4M3),
            scales=((2, blocks, mp), jnp.float32),
            values_t=((mp // BLOCK, 2 * f, BLOCK), E4M3),
            scales_t=of_columns(2 * f, mp // BLOCK, operands[0]),
            act_values_t=((mp // BLOCK, f, BLOCK), E4M3),
            act_scales_t=of_columns(f, mp // BLOCK, operands[1]),
            d_gates=((blocks, mp), jnp.float32),
        ),
        scratch=dict(
            hidden_s=tile_of(E4M3, QUARTERS, 2, QUARTER, BLOCK),
            hidden_scales_s=plgpu.SMEM((QUARTERS, 2, QUARTER), jnp.float32),
            d_act_s=tile_of(d_act.dtype, QUARTERS, QUARTER, BLOCK),
            gates_s=plgpu.SMEM((QUARTERS, 2, QUARTER), jnp.float32),  # and their gradients
            of_pieces_s=plgpu.SMEM((QUARTERS, 4, BLOCK), jnp.uint32),
            turn_s=tile_of(jnp.float32, QUARTERS, QUARTER, BLOCK),
            largest_s=plgpu.SMEM((3, QUARTERS, BLOCK), jnp.uint32),
            values_s=tile_of(E4M3, QUARTERS, 2, QUARTER, BLOCK),
            scales_s=plgpu.SMEM((QUARTERS, 2, QUARTER), jnp.float32),
            values_t_s=tile_of(E4M3, 3, BLOCK, BLOCK),
            next_s=plgpu.SMEM((1,), jnp.int32),
            loaded=plgpu.Barrier(num_arrivals=1 + len(inputs), num_barriers=QUARTERS),
            largest_known=plgpu.Barrier(num_arrivals=QUARTERS, num_barriers=3),
            made=plgpu.Barrier(num_arrivals=QUARTERS),
        ),
        interpret=interpret,
        num_threads=QUARTERS,
        thread_name="quarter",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*inputs, counter())
    turned = values_t, whole_columns(scales_t, 2 * f), act_values_t, whole_columns(act_scales_t, f)
    return values[:rows], scales.reshape(2 * blocks, mp), *turned, None if gates is None else d_gates.sum(0)[:rows]


def _backward_body(hidden, hidden_scales, d_act, *refs, of_tensors, **shared):
    """Four warpgroups with 32 rows of a tile each, which share the largest of their columns and its turned tiles; then the next tile.

    The next rows come in while the last are worked on. A warpgroup meets once a tile, for the largest of its rows; what else warps
    wait for has been said some work before, by barriers that let those who say it go on. The counter is asked for the tile after the next.
    """
    *gates, tickets, values, scales, values_t, scales_t, act_values_t, act_scales_t, d_gates = refs
    blocks, quarter, first, step = d_gates.shape[0], lax.axis_index("quarter"), lax.axis_index("sm"), lax.axis_size("sm")
    tiles = values_t.shape[0] * blocks
    by_loader, by_storer = (functools.partial(in_one_warp, w) for w in (quarter, lax.rem(quarter + 2, QUARTERS)))

    def own(zero):
        return {name: ref if name in _SHARED else ref.at[quarter + zero] for name, ref in shared.items()}

    def place(tile):
        i, j = lax.div(tile, blocks), lax.rem(tile, blocks)
        return i, (j, blocks + j), pl.ds(i * BLOCK + quarter * QUARTER, QUARTER)

    def turned(tile):
        """Values and scales of columns: where they go."""
        i, (gate, up), _ = place(tile)
        targets = (values_t, scales_t, gate), (values_t, scales_t, up), (act_values_t, act_scales_t, gate)
        return [(of_values.at[i, at_block(j)], of_scales.at[i, at_block(j)]) for of_values, of_scales, j in targets]

    def load(tile, s):
        _, sides, rows = place(tile)
        copies = [(hidden.at[rows, at_block(j)], s["hidden_s"].at[side]) for side, j in enumerate(sides)]
        copies += [(hidden_scales.at[:, sides[0], rows], s["hidden_scales_s"])]
        copies += [(d_act.at[rows, at_block(sides[0])], s["d_act_s"])] + [(g.at[rows], s["gates_s"].at[0]) for g in gates]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, s["loaded"])

    def store(tile, s):
        _, sides, rows = place(tile)
        copies = [(s["values_s"].at[side], values.at[rows, at_block(j)]) for side, j in enumerate(sides)]
        copies += [(s["scales_s"], scales.at[:, sides[0], rows]), (s["gates_s"].at[1], d_gates.at[sides[0], rows])]
        plgpu.barrier_wait(s["made"])
        start_all(copies)
        for slot, (target, _) in enumerate(turned(tile)):
            pl.when(quarter == slot)(functools.partial(start_all, [(s["values_t_s"].at[slot], target)]))
        plgpu.commit_smem_to_gmem_group()

    def run(carry):
        n, tile, following = carry
        s = own(here(n))
        ticket = lax.cond(quarter == 0, lambda: take(tickets), lambda: jnp.int32(0))
        plgpu.barrier_wait(s["loaded"])
        inputs = _backward_inputs(bool(gates), s)
        fence()
        tensors, factor, d_gates_part = _gradients(*inputs)
        for kind, keys in enumerate([*(keys_of(x, LINE(4)) for x in tensors), unsigned(d_gates_part)]):
            s["of_pieces_s"][kind] = keys
        by_storer(wait_for_stores)
        meet()
        by_loader(lambda: pl.when(following < tiles)(lambda: load(following, s)))
        pl.when(quarter == 0)(lambda: publish(s["next_s"], ticket))
        kept = _quantize_rows_of(tensors, factor, [power for power, _ in of_tensors], s)
        _quantize_turned((lambda: tensors[0], lambda: tensors[1], lambda: opened(*kept)), of_tensors, quarter, turned(tile), s)
        after_that = 2 * step + s["next_s"][0]
        fence()
        plgpu.barrier_arrive(s["made"])
        by_storer(lambda: store(tile, s))
        return n + 1, following, after_that

    by_loader(lambda: load(first, own(0)))
    lax.while_loop(lambda carry: carry[1] < tiles, run, (jnp.int32(0), first, first + step))
    by_storer(wait_for_stores)


_SHARED = ("next_s", "largest_s", "largest_known", "values_t_s", "made")  # of all warpgroups; each has its part of the rest


def _backward_inputs(gated: bool, s: dict) -> tuple[list[Array], list[Array], Array, Array | None]:
    """Values of gate and up, their scales, the gradient of the activation, and `gates`."""
    hidden = [load_pieces(s["hidden_s"].at[side], E4M3) for side in (0, 1)]
    scales = [load_of_rows(s["hidden_scales_s"].at[side]) for side in (0, 1)]
    return hidden, scales, load_pieces(s["d_act_s"], jnp.bfloat16), load_of_rows(s["gates_s"].at[0]) if gated else None


# In units of it, gate and up (and in units of its square the activation) are what `exp2` takes: no product turns gate into that.
_UNIT = -math.log(2)


def _gradients(hidden: list[Array], scales: list[Array], d_act: Array, gates: Array | None) -> tuple[tuple[Array, ...], Array, Array]:
    """Gradients of gate and up and the activation, what rows of that are multiplied by, and sums over columns for that of `gates`."""
    factor = jnp.full_like(scales[0], _UNIT) if gates is None else gates * _UNIT
    parts: list = []
    d_gates: Any = 0.0
    for first in range(0, 32, 8):  # some columns after the others, or all steps of all columns are in registers at once
        part = slice(first, first + 8)
        gate, up = (opened(x[:, part], scale * (1 / _UNIT)) for x, scale in zip(hidden, scales, strict=True))
        *wide, d_gates_part = _gradients_of(gate, up, widened(d_act[:, part], LINE(4)), factor)
        parts.append(wide)
        d_gates += d_gates_part
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)), factor * _UNIT, jnp.sum(d_gates, axis=1) * _UNIT**2


def _gradients_of(gate: Array, up: Array, d_act: Array, factor: Array) -> tuple[Array, Array, Array, Array]:
    """Gradients of gate and up, the activation without `gates`, and terms of the gradient of those; `factor` is _UNIT times them."""
    sigmoid = _sigmoid(gate, LINE(4))
    silu = gate * sigmoid
    act = silu * up
    gated = d_act * lax.broadcast_in_dim(factor, act.shape, (0,))
    return gated * up * (sigmoid + silu * (_UNIT - _UNIT * sigmoid)), gated * silu, act, d_act * act


def _quantize_rows_of(tensors: tuple, factor: Array, powers: list, s: dict) -> tuple[Array, Array]:
    """1x128 tiles of both gradients, stored, and those of the activation. All pieces of a row have said what is largest in them."""
    *keys, d_gates = ([load_of_rows(s["of_pieces_s"].at[kind, pl.ds(32 * w, 32)]) for w in range(4)] for kind in range(4))
    s["gates_s"][1] = of_rows(functools.reduce(jnp.add, map(as_float, d_gates)))
    largest = [largest_of(functools.reduce(jnp.maximum, of_pieces)) for of_pieces in keys]
    for side in (0, 1):
        values, scale = quantize_known(tensors[side], LINE(4), largest[side], powers[side])
        store_pieces(s["values_s"].at[side], values)
        s["scales_s"][side] = of_rows(scale)
    return quantize_known(tensors[2], LINE(4), largest[2], powers[2], factor)


def _quantize_turned(tensors: tuple, of_tensors: tuple, quarter: Array, targets: list, s: dict) -> None:
    """128x1 tiles, turned by way of shared memory, one after the other: a thread then has 32 rows of a column.

    A warp turns columns of its own. The largest of a column's other rows are in `largest_s`.
    """
    turned = []
    for slot, tensor in enumerate(tensors):
        turned.append(turn(s["turn_s"], tensor()))
        s["largest_s"][slot, quarter] = keys_of(turned[slot], LINE(4))
        plgpu.barrier_arrive(s["largest_known"].at[slot])
    for slot, (x, (power_of_two, operand), (_, of_scales)) in enumerate(zip(turned, of_tensors, targets, strict=True)):
        plgpu.barrier_wait(s["largest_known"].at[slot])
        scale = scale_of_columns(s["largest_s"].at[slot], power_of_two)
        store_columns(s["values_t_s"].at[slot], computed_quotient(x, LINE(4), scale, power_of_two), quarter)

        @pl.when(quarter == slot + 1)
        def _(scale=scale, operand=operand, of_scales=of_scales):
            of_scales[...] = as_operand(scale, operand)


def _sigmoid(x: Array, layout: Any) -> Array:
    """1 / (1 + exp2(x)), for x in units of `_UNIT`, without a quotient's care for extremes: within 2e-6 of it where exp2(x) is exp(20)."""
    return reciprocal(1.0 + jnp.exp2(x), layout)
