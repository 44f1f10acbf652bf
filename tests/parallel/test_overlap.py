"""With `parallel.overlap` the exchanges of one half of the rows and the products of the other do not wait for each other."""

import dataclasses

import pytest

from dsv3_jax.config import MeshConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.lowered import lower_train_step
from experiments.bench.collectives import is_product, pairs
from experiments.bench.hlo import depends_on, parse
from tests.small import CONFIG, model

MESH = MeshConfig(node=2, gpu=2)


def forward_loop(overlap):
    """The program of a train step, and the body of its loop over layers in the forward pass."""
    shape = model(num_hidden_layers=5, first_k_dense_replace=0, num_nextn_predict_layers=0)  # deep enough to be a loop on a CPU
    config = dataclasses.replace(CONFIG, model=shape, parallel=ParallelConfig(MESH, overlap=overlap))
    program = parse(lower_train_step(config, make_mesh(MESH)).compile().as_text())
    (body,) = (
        lines
        for lines in program.computations.values()
        if any(start.opcode == "all-to-all" and "transpose" not in start.attributes for start, _ in pairs(lines))
    )
    return program, body


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_only_with_overlap_exchanges_and_products_do_not_wait_for_each_other(overlap):
    program, body = forward_loop(overlap)
    sources = depends_on(body)
    exchanges = [start.name for start, _ in pairs(body) if start.opcode == "all-to-all"]
    products = [
        line.name for line in body if is_product(line, program) and "experts" in line.attributes and "shared" not in line.attributes
    ]
    assert len(exchanges) == 3 * (1 + overlap) and products  # gates and numbers, rows there, rows back
    beside = [name for name in exchanges if any(name not in sources[p] and p not in sources[name] for p in products)]
    assert beside == (exchanges if overlap else [])
