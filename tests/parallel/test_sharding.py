"""The table of places: what it says of every parameter, and what it refuses."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.model.init import parameter_shapes
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import parameter_name, place, places
from tests.small import MODEL

MESH = make_mesh(MeshConfig(data=2, node=2, gpu=2))
EXPERTS = ("node", "gpu")


@pytest.mark.parametrize(
    ("name", "shape", "compute", "master"),
    [
        ("embed", (48, 24), P(), P(("data", "node", "gpu"))),
        ("lm_head", (24, 48), P(), P(None, ("data", "node", "gpu"))),
        ("moe/mlp/experts/down_proj", (3, 8, 12, 24), P(None, EXPERTS), P(None, EXPERTS, None, "data")),
        ("moe/mlp/router", (8, 24, 12), P(), P(None, ("data", "node", "gpu"))),  # never along layers
        ("dense/self_attn/kv_a_proj_with_mqa/kernel", (1, 20, 12), P(), P(None, ("node", "gpu"))),  # 8 divides nothing, 4 does
        ("moe/input_layernorm/scale", (8, 7), P(), P()),
    ],
)
def test_places(name, shape, compute, master):
    got = place(name, shape, MESH)
    assert got.compute == compute
    assert got.master == master


def test_a_gradient_is_summed_over_every_axis_once():
    shapes = parameter_shapes(MODEL)
    for path, at in jax.tree_util.tree_leaves_with_path(places(shapes, MESH)):
        cut = EXPERTS if "experts" in parameter_name(path).split("/") else ()
        assert sorted((*cut, *at.axes, *at.summed)) == ["data", "gpu", "node", "pipe"], path


def test_one_device_cuts_nothing():
    assert {at.axes for at in jax.tree.leaves(places(parameter_shapes(MODEL), make_mesh(MeshConfig())))} == {()}


def test_collisions_and_sizes_that_do_not_divide_name_both_sides():
    with pytest.raises(ConfigError, match=r"moe/experts/w = 'gpu': dimensions 1 and 2 both lie on it"):
        place("moe/experts/w", (2, 8, 8), MESH, (("experts", (None, EXPERTS, "gpu")),))
    with pytest.raises(ConfigError, match=r"dimension 1 is 6, which node 2 x gpu 2 do not divide"):
        place("moe/experts/w", (2, 6, 8), MESH)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"parallel\.mesh = 64: pipe 1 x data 64 x node 1 x gpu 1 .* 8 devices"):
        make_mesh(MeshConfig(data=64))
