import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import quantize as ops
from pallas_kernels.quantize import arithmetic, hopper
from pallas_kernels.quantize.reference import tile_scale
from tests.kernels import interpreter
from tests.kernels.quantize_cases import QuantizeCases

SMS = {"swiglu_backward": 3, "retile": 1, "gather_and_retile": 1}  # multiprocessors, for kernels that loop over tiles


class TestReference(QuantizeCases):
    def run(self, name, *arguments):
        return jax.jit(lambda *arrays: getattr(ops, name)(*filled(arguments, arrays), impl="reference"))(*arrays_of(arguments))


class TestInterpreted(QuantizeCases):
    """The kernels as written, on a simulated GPU that reports races between threads and copies.

    It has few multiprocessors, so that memory of each is used again, and the counter of tiles asked.
    """

    fused = False

    def run(self, name, *arguments):
        gpu_callbacks.reset_gpu_interpret_mode_state()
        if name in SMS:
            arguments = *arguments, SMS[name]
        out = getattr(hopper, name)(*arguments, interpret=plgpu.InterpretGPUParams(detect_races=True))
        jax.block_until_ready(out)
        assert not gpu_callbacks.get_races().races_found
        return out


def test_quotients_of_bfloat16_are_those_of_division(monkeypatch):
    """All significands of x and of the largest of its tile, and all distances between them that matter to E4M3."""
    monkeypatch.setattr(arithmetic, "product", lambda x, y, _: interpreter.product_of_normals(x, y))
    significands = jnp.arange(128, 256, dtype=jnp.float32)
    largest = significands[:, None]
    x = significands * jnp.exp2(-jnp.arange(24.0))[:, None, None]
    x = jnp.where(x <= largest, x, 0).transpose(1, 0, 2).reshape(128, -1)
    scale = tile_scale(largest[:, 0], False)
    quotient = arithmetic.quotient(x, scale, (0,), False, arithmetic.SHORT, None).astype(jnp.float8_e4m3fn)
    expected = (np.asarray(x) / np.asarray(scale)[:, None]).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(quotient, np.float32), np.asarray(expected, np.float32))


def arrays_of(arguments):
    return [x for x in arguments if isinstance(x, (jax.Array, np.ndarray))]


def filled(arguments, arrays):
    arrays = iter(arrays)
    return [next(arrays) if isinstance(x, (jax.Array, np.ndarray)) else x for x in arguments]


E4M3 = jnp.zeros((2, 32), jnp.float8_e4m3fn)
NARROW = ("retile", (1152, 160), "float8_e4m3fn")  # swizzles of 32 bytes


@pytest.mark.parametrize(("name", "shape", "dtype"), [*hopper.PRODUCTION, NARROW])
def test_sizes_of_training_can_be_lowered(name, shape, dtype, monkeypatch):
    """Layouts, shared memory and bank conflicts are settled in lowering, which needs no GPU."""
    monkeypatch.setattr(ops, "sm_count", lambda: 132)
    x = jax.ShapeDtypeStruct(shape, dtype)
    rows = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    scales = jax.ShapeDtypeStruct((-(-shape[-1] // 128), shape[0]), jnp.float32)
    values = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
    d_act = jax.ShapeDtypeStruct((shape[0], shape[1] // 2), dtype)
    arguments = {
        "quantize_blocks": [x],
        "quantize_and_keep": [x],
        "retile": [x, scales, True, "left"],
        "gather_and_retile": [x, scales, jax.ShapeDtypeStruct(shape[:1], jnp.int32), True, True, "right"],
        "swiglu_quantize": [x, rows, True],
        "swiglu_backward": [values, scales, rows, d_act, False, True, True],
    }.get(name, [x, False])
    traced = [a for a in arguments if isinstance(a, jax.ShapeDtypeStruct)]
    flags = arguments[len(traced) :]
    jax.jit(lambda *arrays: getattr(ops, name)(*arrays, *flags, impl="pallas")).trace(*traced).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.quantize_rows(jnp.zeros((4, 8), jnp.float16), impl="reference"), "x: dtype float16"),
        (lambda: ops.quantize_rows(jnp.zeros((0, 8)), impl="reference"), "x: shape"),
        (lambda: ops.quantize_blocks(jnp.zeros((1, 1, 4, 8)), impl="reference"), "w: shape"),
        (lambda: ops.swiglu_quantize(jnp.zeros((2, 7), jnp.bfloat16), None), "hidden: shape"),
        (lambda: ops.retile(jnp.zeros((2, 8), jnp.bfloat16), jnp.ones((1, 2))), "scales: shape"),
        (lambda: ops.quantize_rows(jnp.zeros((2, 8)), impl="triton"), "impl='triton'"),
        (lambda: ops.quantize_both(jnp.zeros((2, 8)), operand="a"), "operand='a'"),
        (lambda: ops.gather_and_retile(E4M3, jnp.ones((1, 128)), jnp.zeros(4, jnp.int32)), "source: shape"),
        (lambda: ops.gather_and_retile(E4M3, jnp.ones((1, 128)), jnp.zeros(256, jnp.int32)), "scales: shape"),
    ],
)
def test_errors_name_the_field(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.quantize_rows(jnp.zeros((4, 48)), impl="pallas"),
        lambda: ops.quantize_blocks(jnp.zeros((24, 16)), impl="pallas"),
        lambda: ops.swiglu_quantize(jnp.zeros((4, 64), jnp.bfloat16), None, impl="pallas"),
        lambda: hopper.gather_and_retile(E4M3, jnp.ones((1, 128)), jnp.zeros(128, jnp.int32), False, False, None, 1),
    ],
)
def test_a_kernel_refuses_what_it_cannot_take(call):
    with pytest.raises(NotImplementedError, match=r"use the reference|gather first"):
        call()


def test_two_callers_share_one_kernel():
    """A kernel's module holds source locations; a second module would be compiled for a second and a half."""

    def first(x):
        return ops.quantize_rows(x, impl="pallas")[0]

    def step(x):
        return first(x), ops.quantize_rows(x, impl="pallas")[1]

    text = jax.jit(step).trace(jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    assert len({line.split("{", 1)[1] for line in text.splitlines() if "custom_call @mosaic_gpu" in line}) == 1
