"""The loop over layers: values and gradients of `lax.scan`, and no memory that is read before it is written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.model import stack
from dsv3_jax.model.transformer import rematerialised

LAYERS, WIDTH = 5, 8
CONSTANT = np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)


def layer(x, one, context):
    """Keeps what a layer of the model does: its input, a named activation, parts of its parameters and of the context, a constant."""
    kernels, shift = one
    hidden = checkpoint_name(jnp.tanh(x @ kernels["up"]), "swiglu_in")
    y = x * CONSTANT + jnp.sin(hidden @ kernels["down"]) * context["weights"][:, None] + shift.sum()
    return y, (hidden.sum(), jnp.where(context["ids"] > 1, x.mean(1), 0.0))


def operands():
    keys = jax.random.split(jax.random.key(0), 5)
    kernels = {"up": jax.random.normal(keys[0], (LAYERS, WIDTH, 16)), "down": jax.random.normal(keys[1], (LAYERS, 16, WIDTH))}
    context = {"weights": jax.random.uniform(keys[3], (4,)), "ids": jnp.arange(4)}
    return jax.random.normal(keys[4], (4, WIDTH)), (kernels, jax.random.normal(keys[2], (LAYERS, 3))), context


def gradients(run, policy):
    """Of a number that every output has a part in, whose gradient differs from layer to layer."""
    x, per_layer, context = operands()

    def number(x, per_layer):
        y, (sums, means) = run(rematerialised(layer, policy), x, per_layer, context)
        return (y**2).sum() + (sums * jnp.arange(LAYERS)).sum() + (means**2).sum()

    return jax.jit(jax.value_and_grad(number, (0, 1))), (x, per_layer)


def by_scan(f, x, per_layer, context):
    return jax.lax.scan(lambda x, one: f(x, one, context), x, per_layer)


def of_first(count):
    """`by_scan` over so many layers: the others report zeros, and have gradients of zero."""

    def run(f, x, per_layer, context):
        x, reports = by_scan(f, x, jax.tree.map(lambda a: a[:count], per_layer), context)
        return x, jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros((LAYERS - count, *a.shape[1:]))]), reports)

    return run


@pytest.fixture
def never_cleared(monkeypatch):
    """A CPU gives zeros where a GPU gives whatever was there before: here it is NaN, the largest of integers, or True."""

    def poisoned(shape, dtype):
        if jnp.issubdtype(dtype, jnp.bool_):
            return jnp.ones(shape, dtype)
        return jnp.full(shape, jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)

    monkeypatch.setattr(jax.lax, "empty", poisoned)


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "written out"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_values_and_gradients_are_those_of_a_scan(policy, unroll, never_cleared):
    run, arguments = gradients(functools.partial(stack.scan_layers, unroll=unroll), policy)
    expected = gradients(by_scan, policy)[0](*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(*arguments), expected)


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "written out"])
@pytest.mark.parametrize("count", [0, 3, LAYERS])
def test_padding_changes_nothing_and_has_no_gradient(count, unroll, never_cleared):
    run, arguments = gradients(functools.partial(stack.scan_layers, count=jnp.int32(count), unroll=unroll), "selective")
    expected = gradients(of_first(count), "selective")[0](*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(*arguments), expected)


@pytest.mark.parametrize("count", [None, 3])
def test_outputs_without_a_gradient(count, never_cleared):
    x, per_layer, context = operands()
    runs = functools.partial(stack.scan_layers, count=count and jnp.int32(count)), of_first(count) if count else by_scan
    got, expected = (jax.jit(lambda x, p, run=run: run(layer, x, p, context))(x, per_layer) for run in runs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


def test_a_gpu_fills_no_stack_with_zeros():
    run, arguments = gradients(stack.scan_layers, "selective")
    text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    of_stacks = [line for line in text.splitlines() if f"tensor<{LAYERS}x" in line.split("->")[-1]]
    assert sum("AllocateBuffer" in line for line in of_stacks) >= 5  # x and the named activation; three kinds of parameters
    assert not [line for line in of_stacks if "broadcast_in_dim" in line and f"{LAYERS}x4x{WIDTH}x" in line]


@pytest.mark.parametrize("used", [False, True])
def test_only_what_a_layer_uses_too_is_kept_apart_from_it(used):
    """Without a barrier a GPU's kernel that makes it would run twice; with one, what is only kept would be copied."""

    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    def forward(x):
        kept = checkpoint_name(x @ jnp.ones((WIDTH, 2)), "swiglu_in")
        return jnp.sin(x) + (kept.sum() if used else 0.0), kept

    f.defvjp(forward, lambda kept, d: (d * kept.sum(),))
    x, per_layer, _ = operands()

    def number(x):
        return stack.scan_layers(rematerialised(lambda x, one, context: (f(x), ()), "selective"), x, per_layer, ())[0].sum()

    text = jax.jit(jax.grad(number)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert sum("optimization_barrier" in line and "tensor<4x2xf32>" in line for line in text.splitlines()) == used
