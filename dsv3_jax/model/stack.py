"""A loop over the layers of a stack, as `lax.scan`, whose backward pass reads what layers kept from memory that nobody cleared before."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from dsv3_jax.residuals import Residuals


def scan_layers(
    layer: Callable[[Array, PyTree, PyTree], tuple[Array, PyTree]],
    x: Array,
    per_layer: PyTree,
    context: PyTree,
    count: Int[Array, ""] | None = None,
    unroll: bool = False,
) -> tuple[Array, PyTree]:
    """`layer(x, of_this_layer, context) -> (x, report)` for each layer in turn: the last x, and the reports, stacked.

    Values and gradients are those of `lax.scan`, which fills the stacks of what its backward pass needs, and of the gradients,
    with zeros before it writes them: 2 % of a training step. No gradient reaches `context`, and `layer` may close over no
    array that has one.

    `count`: only the first so many are layers, and the rest is padding with a report of zeros; None: all are.
    `unroll`: writes the layers out instead of a loop.
    """
    step = _Step(layer, unroll)
    run = jax.custom_vjp(step.values)
    run.defvjp(step.forward, step.backward)
    return run(x, per_layer, context, count)


class _Step:
    """The passes of one `scan_layers`."""

    def __init__(self, layer: Callable, unroll: bool) -> None:
        self.layer, self.unroll, self.residuals = layer, unroll, Residuals()

    def values(self, x: Array, per_layer: PyTree, context: PyTree, count: Array | None) -> tuple[Array, PyTree]:
        """The outputs, where no gradient is asked for."""

        def one_of(x: Array, numbered: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            i, one = numbered
            return _or_padding(i, count, lambda: self.layer(x, one, context), x)

        return jax.lax.scan(one_of, x, (jnp.arange(_layers(per_layer)), per_layer), unroll=self.unroll)

    def forward(self, x: Array, per_layer: PyTree, context: PyTree, count: Array | None) -> tuple[tuple[Array, PyTree], tuple]:
        """The outputs, and stacks of what each layer keeps beside its own parameters and the context, which are there anyway."""
        traced, shapes = jax.make_jaxpr(self._keeping, return_shape=True)(x, jax.eval_shape(_at, per_layer, 0), context)
        run, layers = jax.extend.core.jaxpr_as_fun(traced), _layers(per_layer)
        variables, used = traced.jaxpr.outvars, {id(v) for equation in traced.jaxpr.eqns for v in equation.invars}

        def body(i: Any, carry: tuple) -> tuple:
            x, *stacks = carry
            outputs = _or_padding(i, count, lambda: run(*jax.tree.leaves((x, _at(per_layer, i), context))), x)
            # XLA:GPU has kernels write into a stack themselves. One whose output the layer uses too would run twice, once for each.
            apart = [jax.lax.optimization_barrier(out) if id(v) in used else out for v, out in zip(variables, outputs, strict=True)]
            x, *new = jax.tree.unflatten(jax.tree.structure(shapes), apart)
            return x, *_put(stacks, new, i)

        x, reports, stacks = self._loop(layers, body, (x, *_uncleared(shapes[1:], layers)))
        return (x, reports), (stacks, per_layer, context, count)

    def _keeping(self, x: Array, one: PyTree, context: PyTree) -> tuple[Array, PyTree, list[Array]]:
        (y, report), pull = jax.vjp(lambda x, one: self.layer(x, one, context), x, one)
        return y, report, self.residuals.take(pull, (one, context))

    def backward(self, residual: tuple, cotangent: tuple[Array, PyTree]) -> tuple[Array, PyTree, None, None]:
        """Gradients of x and of every layer's parameters, from the last layer to the first."""
        stacks, per_layer, context, count = residual
        dx, d_reports = cotangent
        layers = _layers(per_layer)

        def body(n: Any, carry: tuple) -> tuple:
            i, (dx, gradients) = layers - 1 - n, carry

            def of_layer() -> tuple[Array, PyTree]:
                return self.residuals.restore(_at(stacks, i), (_at(per_layer, i), context))((dx, _at(d_reports, i)))

            dx, d_one = _or_padding(i, count, of_layer, dx)
            return dx, _put(gradients, d_one, i)

        of_one = jax.eval_shape(_at, per_layer, 0)
        return *self._loop(layers, body, (dx, _uncleared(of_one, layers))), None, None

    def _loop(self, layers: int, body: Callable[[Any, tuple], tuple], carry: tuple) -> tuple:
        if self.unroll:
            return functools.reduce(lambda carry, i: body(i, carry), range(layers), carry)
        # `fori_loop`, but i is the loop's own counter: by it XLA sees that kernels may write into stacks, and read them, without copies.
        return jax.lax.while_loop(lambda state: state[0] < layers, lambda state: (state[0] + 1, body(*state)), (jnp.int32(0), carry))[1]


def _or_padding(i: Any, count: Array | None, of_layer: Callable[[], Any], x: Array) -> Any:
    """Results of layer i; of padding x, which is the first of them, and zeros."""
    if count is None:
        return of_layer()
    (_, *others), structure = jax.tree.flatten(jax.eval_shape(of_layer))
    of_padding = lambda: jax.tree.unflatten(structure, [x, *(jnp.zeros(leaf.shape, leaf.dtype) for leaf in others)])  # noqa: E731
    return jax.lax.cond(i < count, of_layer, of_padding)


def _layers(per_layer: PyTree) -> int:
    return jax.tree.leaves(per_layer)[0].shape[0]


def _at(stacked: PyTree, i: Any) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stacked)


def _put(stacks: PyTree, new: PyTree, i: Any) -> PyTree:
    return jax.tree.map(lambda stack, a: jax.lax.dynamic_update_index_in_dim(stack, a, i, 0), stacks, new)


def _uncleared(one: PyTree, layers: int) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.empty((layers, *a.shape), a.dtype), one)
