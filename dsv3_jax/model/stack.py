"""A loop over the layers of a stack, as `lax.scan`, whose backward pass reads what layers kept from memory that nobody cleared before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def scan_layers(
    layer: Callable[[Array, PyTree, PyTree], tuple[Array, PyTree]], x: Array, per_layer: PyTree, context: PyTree
) -> tuple[Array, PyTree]:
    """`layer(x, of_this_layer, context) -> (x, report)` for each layer in turn: the last x, and the reports, stacked.

    Values and gradients are those of `lax.scan`, which fills the stacks of what its backward pass needs, and of the gradients,
    with zeros before it writes them: 2 % of a training step. No gradient reaches `context`, and `layer` may close over no
    array that has one.
    """
    run = jax.custom_vjp(lambda x, per_layer, context: jax.lax.scan(lambda x, one: layer(x, one, context), x, per_layer))
    step = _Step(layer)
    run.defvjp(step.forward, step.backward)
    return run(x, per_layer, context)


class _Step:
    """Both passes of one `scan_layers`; the forward pass leaves behind how the second one finds what a layer kept."""

    def __init__(self, layer: Callable) -> None:
        self.layer = layer

    def forward(self, x: Array, per_layer: PyTree, context: PyTree) -> tuple[tuple[Array, PyTree], tuple]:
        """The outputs, and stacks of what each layer keeps beside its own parameters and the context, which are there anyway."""
        traced, shapes = jax.make_jaxpr(self._keeping, return_shape=True)(x, jax.eval_shape(_at, per_layer, 0), context)
        run, layers = jax.extend.core.jaxpr_as_fun(traced), _layers(per_layer)
        variables, used = traced.jaxpr.outvars, {id(v) for equation in traced.jaxpr.eqns for v in equation.invars}

        def body(i: Array, carry: tuple) -> tuple:
            x, *stacks = carry
            outputs = run(*jax.tree.leaves((x, _at(per_layer, i), context)))
            # XLA:GPU has kernels write into a stack themselves. One whose output the layer uses too would run twice, once for each.
            apart = [jax.lax.optimization_barrier(out) if id(v) in used else out for v, out in zip(variables, outputs, strict=True)]
            x, *new = jax.tree.unflatten(jax.tree.structure(shapes), apart)
            return x, *_put(stacks, new, i)

        x, reports, stacks = _loop(layers, body, (x, *_uncleared(shapes[1:], layers)))
        return (x, reports), (stacks, per_layer, context)

    def _keeping(self, x: Array, one: PyTree, context: PyTree) -> tuple[Array, PyTree, list[Array]]:
        (y, report), pull = jax.vjp(lambda x, one: self.layer(x, one, context), x, one)
        needed, self.tree = jax.tree.flatten(pull)
        there = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((one, context)))}
        # Where each is found again: None, in the stacks; a number, there; an array, a constant of the program.
        self.places = [there.get(id(leaf)) if isinstance(leaf, jax.core.Tracer) else leaf for leaf in needed]
        return y, report, [leaf for leaf, place in zip(needed, self.places, strict=True) if place is None]

    def backward(self, residual: tuple, cotangent: tuple[Array, PyTree]) -> tuple[Array, PyTree, None]:
        """Gradients of x and of every layer's parameters, from the last layer to the first."""
        stacks, per_layer, context = residual
        dx, d_reports = cotangent
        layers = _layers(per_layer)

        def body(n: Array, carry: tuple) -> tuple:
            i, (dx, gradients) = layers - 1 - n, carry
            kept, there = iter(_at(stacks, i)), jax.tree.leaves((_at(per_layer, i), context))
            found = [next(kept) if place is None else there[place] if isinstance(place, int) else place for place in self.places]
            dx, d_one = jax.tree.unflatten(self.tree, found)((dx, _at(d_reports, i)))
            return dx, _put(gradients, d_one, i)

        of_one = jax.eval_shape(_at, per_layer, 0)
        return *_loop(layers, body, (dx, _uncleared(of_one, layers))), None


def _loop(layers: int, body: Callable[[Array, tuple], tuple], carry: tuple) -> tuple:
    """`fori_loop`, but i is the loop's own counter: by it XLA sees that kernels may write into stacks, and read them, without copies."""
    return jax.lax.while_loop(lambda state: state[0] < layers, lambda state: (state[0] + 1, body(*state)), (jnp.int32(0), carry))[1]


def _layers(per_layer: PyTree) -> int:
    return jax.tree.leaves(per_layer)[0].shape[0]


def _at(stacked: PyTree, i: Any) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stacked)


def _put(stacks: PyTree, new: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda stack, a: jax.lax.dynamic_update_index_in_dim(stack, a, i, 0), stacks, new)


def _uncleared(one: PyTree, layers: int) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.empty((layers, *a.shape), a.dtype), one)
