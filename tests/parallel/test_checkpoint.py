"""A checkpoint written on one mesh loads on any other, bit for bit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.training.checkpoint import Checkpointer, abstract_like
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import create_state
from tests.small import CONFIG, MODEL, TRAIN

SMALL = dataclasses.replace(MODEL, num_hidden_layers=2)
CREATE = functools.partial(create_state, dataclasses.replace(CONFIG, model=SMALL, train=TRAIN), make_optimizer(CONFIG.optimizer))


def on_mesh(sizes):
    """The shapes of a training state with its places on a mesh."""
    shapes = jax.eval_shape(CREATE)
    return abstract_like(shapes, state_shardings(shapes, make_mesh(MeshConfig(*sizes))))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of 8 devices, and what it holds; the moments are no longer zeros."""
    folder, rng = tmp_path_factory.mktemp("mesh"), np.random.default_rng(0)
    values = jax.tree.map(lambda s: np.asarray(rng.normal(size=s.shape)).astype(s.dtype), jax.eval_shape(CREATE))
    state = jax.device_put(values, jax.tree.map(lambda s: s.sharding, on_mesh((1, 2, 2, 2))))
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(1, state, state.params, {"progress": 1})
    checkpointer.close()
    return folder, values


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (1, 1, 1, 1), (1, 1, 4, 2)], ids=["2 devices", "1 device", "4 nodes of 2"])
def test_loads_bit_equal(written, sizes):
    folder, values = written
    wanted = on_mesh(sizes)
    checkpointer = Checkpointer(folder, keep=1)
    read = checkpointer.restore(wanted, wanted.params)
    checkpointer.close()
    for tree, expected in ((read.state, values), (read.ema, values.params)):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
            assert np.asarray(a).tobytes() == b.tobytes(), jax.tree_util.keystr(path)
    assert jax.tree.map(lambda a: a.sharding, read.state) == jax.tree.map(lambda s: s.sharding, wanted)
