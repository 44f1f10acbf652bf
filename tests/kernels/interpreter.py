"""Runs kernels on a simulated GPU that reports races between threads and copies."""

import dataclasses
import functools
import inspect
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter, resolve_ref
from jax._src.state.primitives import swap_p
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels import interpreted_pieces as pieces


def interpreted(run):
    """The output of `run`, which calls kernels; fails on a race."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = jax.block_until_ready(run())
    assert not gpu_callbacks.get_races().races_found
    return out


# The interpreter of jax 0.11.2 has no `acc[...] = x` of a wgmma accumulator. Here it becomes an ordinary store, but for
# races, which registers do not know.
_interpret, _swap = JaxprInterpreter.interpret, JaxprInterpreter._interpret_swap_p


def _with_swaps(self, jaxpr, token, *values):
    stores = dict(primitive=swap_p, params={"tree": jax.tree.structure(())})
    eqns = [eqn.replace(**stores) if eqn.primitive is primitives.wgmma_accumulator_store_p else eqn for eqn in jaxpr.eqns]
    return _interpret(self, jaxpr.replace(eqns=eqns), token, *values)


def _swap_or_store(self, eqn, token, get_values):
    if not isinstance(eqn.invars[0].aval, core.WGMMAAbstractAccumulatorRef):
        return _swap(self, eqn, token, get_values)
    key, value = get_values()
    store = functools.partial(_store_accumulator, source_info=eqn.source_info)
    out = (gpu_callbacks.TOKEN_SHAPE_DTYPE, eqn.outvars[0].aval)
    return callback.io_callback(store, out, token=token, mesh_location=self.mesh_location, thread=self.thread, key=key, value=value)


@gpu_callbacks.fail_on_exception
def _store_accumulator(*, token, mesh_location, thread, key, value, source_info):
    key, memory = gpu_callbacks.HostAllocationKey.from_array(key), gpu_callbacks._get_shared_memory()
    where = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    memory.store_buffer_content(key, memory.access(key, ()), np.array(value), thread, logging_info=where)
    return token, value


# Nor has it stores that add. Those of several blocks to one place are no race, in whatever order they come.
_copy_smem_to_gmem, _adding = gpu_callbacks.copy_smem_to_gmem, threading.Lock()


def _store_or_add(*, reduction_op, **arguments):
    if reduction_op != "add":
        return _copy_smem_to_gmem(reduction_op=reduction_op, **arguments)
    return _add(**arguments)


@gpu_callbacks.fail_on_exception
def _add(*, token, mesh_location, thread, source_info, predicate, commit_group, **arguments):
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread) if memory.detect_races else None
    windows = (*_window(memory, arguments, "src"), *_window(memory, arguments, "dst"))
    with _adding:
        memory.execute_async_task(_Addition(mesh_location, thread, *windows, source_info, clock))
    return token


def _window(memory, arguments, side):
    """Which part of which buffer an operand is."""
    key = gpu_callbacks.HostAllocationKey.from_array(arguments[f"{side}_allocation_key_as_array"])
    transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{side}_transforms"])
    return key, memory.access(key, jax.tree.map(int, transforms))


class _Addition(gpu_callbacks.AsyncCopySmemToGmemTask):
    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        part, before = (
            memory.get_buffer_content(key, access, self.thread, logging_info=self.logging_info)[0]
            for key, access in ((self.src_allocation_key, self.src_access), (self.dst_allocation_key, self.dst_access))
        )
        if memory.detect_races:
            self.clock.inc(tma_thread_id)
            self.write_clock = self.clock.copy()
        if before is not None:  # else all of it lies outside
            shape = memory.buffer_shape_and_dtype(self.dst_allocation_key).shape
            total = part.copy()
            total[tuple(map(slice, before.shape))] += before
            store = gpu_callbacks._clip_store_to_shape(self.dst_access, total, tuple(shape))
            memory.store_buffer_content(self.dst_allocation_key, *store, self.thread, logging_info=self.logging_info)
        self.post_write(tma_thread_id, memory)


# Nor products whose left operand is in registers.
_wgmma = gpu_callbacks.wgmma


def _product(*, a_allocation_key_as_array, **arguments):
    if a_allocation_key_as_array.ndim == 1:
        return _wgmma(a_allocation_key_as_array=a_allocation_key_as_array, **arguments)
    return _product_of_registers(a_allocation_key_as_array, **arguments)


@gpu_callbacks.fail_on_exception
def _product_of_registers(a, *, token, mesh_location, thread, source_info, **arguments):
    memory = gpu_callbacks._get_shared_memory()
    where = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    sums = _window(memory, arguments, "acc")
    b, acc = (memory.get_buffer_content(*at, thread, logging_info=where)[0] for at in (_window(memory, arguments, "b"), sums))
    memory.store_buffer_content(*sums, acc + np.matmul(a, b, dtype=acc.dtype), thread, logging_info=where)
    return token


# Nor what `pallas_kernels.gemm.wgmma` and the `instructions` and `pieces` of `pallas_kernels.quantize` write in PTX. Products are
# made when they are issued, as the interpreter makes all of them.
def _inline(self, eqn, token, get_values):
    name = eqn.params["mgpu_fn"].__name__
    if name == "warpgroup_barrier":  # a warpgroup is one thread here
        return token, []
    if name in _ELEMENTWISE:
        return token, [_ELEMENTWISE[name](*get_values())]
    if name == "fence_of_copies":
        return _fence(self, eqn, token), []
    if name == "rows_are_there":
        return callback.io_callback(_rows_are_there, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, thread=self.thread), []
    if name == "shared_address":
        return token, [jnp.int32(0)]
    if name == "finished":
        return token, get_values()[:1]
    values, number = get_values(), eqn.params["pytree_args"].num_leaves
    transforms = eqn.params["pytree_ref_transforms"].unflatten(values[number:])
    refs = sum(isinstance(type_, plgpu.RefType) for type_ in eqn.params["flat_arg_types"])
    places = [resolve_ref(v.aval, x, t) for v, x, t in zip(eqn.invars[:refs], values, transforms[:refs], strict=False)]
    arguments = dict(token=token, mesh_location=self.mesh_location, thread=self.thread, places=places)
    makes = _with_scales if name == "product_and_scales" else _product_of_memory
    if name in pieces.IN_MEMORY:
        makes, arguments["operands"] = functools.partial(_of_tile, name=name), values[refs:number]
        if name == "turned_stored":
            arguments["operands"].append(jnp.int32(_known(eqn)["first"]))
    run = functools.partial(makes, source_info=eqn.source_info)
    out = (gpu_callbacks.TOKEN_SHAPE_DTYPE, *(x.aval for x in eqn.outvars))
    token, *made = callback.io_callback(run, out, **arguments)
    if name == "product" and _known(eqn)["ends_reads"]:
        token = _fence(self, eqn, token)
    return token, made


def _known(eqn):
    """What the function took from around it."""
    return inspect.getclosurevars(inspect.unwrap(eqn.params["mgpu_fn"])).nonlocals


def _fence(self, eqn, token):
    end = functools.partial(gpu_callbacks.commit_smem, source_info=eqn.source_info)
    return callback.io_callback(end, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, mesh_location=self.mesh_location, thread=self.thread)


def _larger_magnitude(x, y):
    larger = jnp.fmax(jnp.abs(x), jnp.abs(y))
    return jnp.where(jnp.isnan(larger), jnp.nan, -larger)


def product_of_normals(x, y):
    """Without subnormal numbers, which a CPU may have flushed already."""
    smallest = jnp.finfo(jnp.float32).smallest_normal
    flushed = lambda z: jnp.where(jnp.abs(z) < smallest, 0.0, z)  # noqa: E731
    return flushed(flushed(x) * y)


_ELEMENTWISE = {
    "approximate_reciprocal": lambda x: 1 / x,
    "larger_magnitude": _larger_magnitude,
    "other_name": pieces.other_name,
    "same": lambda x, _: x,
    "product_of_normals": product_of_normals,
    "normal_or_zero": lambda x: product_of_normals(x, jnp.float32(1)),
    "pairs_to_float32": lambda x: x.astype(jnp.float32),
    "words_side_by_side": lambda *words: jax.lax.bitcast_convert_type(jnp.stack(words, 1), jnp.bfloat16).reshape(words[0].size, -1),
}


@gpu_callbacks.fail_on_exception
def _product_of_memory(*, token, **arguments):
    a, b = (tile.content()[0] for tile in _tiles(**arguments))
    return token, np.float32(a) @ np.float32(b).T


@gpu_callbacks.fail_on_exception
def _with_scales(*, token, **arguments):
    a, b, *parts = (tile.content()[0] for tile in _tiles(**arguments))
    of_rows, of_columns = (np.float32(x).reshape(-1, 8) for x in parts)
    return token, np.float32(a) @ np.float32(b).T, 2 * of_rows @ of_columns.T  # the parts are there, and are added up, twice


@gpu_callbacks.fail_on_exception
def _of_tile(*, token, name, operands, **arguments):
    """What is in a tile, or is put there."""
    return token, *pieces.IN_MEMORY[name](*_tiles(**arguments), *map(np.array, operands))


@gpu_callbacks.fail_on_exception
def _rows_are_there(*, token, thread):
    pieces.rows_are_there(_owner(thread))
    return token


def _owner(thread):
    return tuple(map(int, jax.tree.leaves(thread)))


class _Tile:
    """A buffer, or a part of it, that a thread reads and writes; both are checked for races, as the interpreter's own are."""

    def __init__(self, memory, key, access, where):
        self.memory, self.key, self.access, self.where, self.owner = memory, key, access, where, _owner(where.thread)

    def content(self):
        """As tensor cores read it, which the interpreter does not check for races; and the clock of the reading."""
        content, _, clock = self.memory.get_buffer_content(self.key, self.access, self.where.thread, logging_info=self.where)
        return content, clock

    def read(self):
        content, clock = self.content()
        self._check(gpu_callbacks.get_races().check_read, clock, self.access)
        return content

    def write(self, x, columns=None):
        access = self.access if columns is None else dataclasses.replace(self.access, range=(*self.access.range[:-1], columns))
        clock = self.put(x, access)
        self._check(gpu_callbacks.get_races().check_write, clock, access)

    def put(self, x, access=None):
        """Without that check."""
        return self.memory.store_buffer_content(self.key, access or self.access, x, self.where.thread, logging_info=self.where)[2]

    def _check(self, check, clock, access):
        if self.memory.detect_races:
            check(self.where.thread, clock.generic_clock, self.key, access, source_info=self.where.source_info)


def _tiles(mesh_location, thread, source_info, places):
    memory = gpu_callbacks._get_shared_memory()
    where = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    windows = [_window(memory, {"x_allocation_key_as_array": key, "x_transforms": transforms}, "x") for key, transforms in places]
    return [_Tile(memory, *window, where) for window in windows]


JaxprInterpreter.interpret, JaxprInterpreter._interpret_swap_p = _with_swaps, _swap_or_store
JaxprInterpreter._interpret_inline_mgpu_p = _inline
gpu_callbacks.copy_smem_to_gmem, gpu_callbacks.wgmma = _store_or_add, _product


# A callback's arguments, mostly single integers, are made JAX arrays by JAX, and integers again by the interpreter, in a quarter
# of the time of such tests. They are copied because XLA frees what it hands over when the callback returns.
_to_int = shared_memory._to_int


def _callback_of_numpy(*args, callback, **_):
    return jax.tree.map(np.asarray, callback(*map(np.array, args)))


callback.io_callback_impl = _callback_of_numpy
shared_memory._to_int = lambda x: x.item() if isinstance(x, np.ndarray) else _to_int(x)
