"""What a backward pass needs of its forward pass, as arrays that a program puts away and reads again."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree


class Residuals:
    """Takes the second result of `jax.vjp` apart in one traced function, and puts it together again in others.

    Of what it needs, inputs of the forward pass are there anyway and constants are part of the program: only the rest is taken.
    """

    def take(self, pull: Callable, inputs: PyTree[Array]) -> list[Array]:
        """What `pull` needs and `inputs` do not have."""
        needed, self._tree = jax.tree.flatten(pull)
        there = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(inputs))}
        # Where each is found again: None, among the taken; a number, there; an array, a constant.
        self._places = [there.get(id(leaf)) if isinstance(leaf, jax.core.Tracer) else leaf for leaf in needed]
        return [leaf for leaf, place in zip(needed, self._places, strict=True) if place is None]

    def restore(self, taken: list[Array], inputs: PyTree[Array]) -> Callable[[Any], Any]:
        """The `pull` that was taken apart, of these values. After `take`, of which only the structure counts."""
        kept, there = iter(taken), jax.tree.leaves(inputs)
        found = [next(kept) if place is None else there[place] if isinstance(place, int) else place for place in self._places]
        return jax.tree.unflatten(self._tree, found)
