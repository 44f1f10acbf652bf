"""The compiled step as text: what it sends, how often, along which axes; and the command that compiles without allocating."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh
from experiments.bench.collectives import collectives, device_groups, hidden, totals
from experiments.bench.hlo import depends_on, parse
from tests.test_cli import assert_refused, run

MESH = {"pipe": 1, "data": 2, "node": 2, "gpu": 2}
SCHEDULED = """HloModule jit_f, is_scheduled=true

%body (x: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %rows = bf16[4,8]{1,0} get-tuple-element(%x), index=1
  %a2a = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-to-all-start(%rows), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %product = bf16[4,4]{1,0} dot(%rows, %rows), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %moved = bf16[4,8]{1,0} all-to-all-done(%a2a)
  %later = bf16[4,8]{1,0} all-to-all(%moved), replica_groups=[2,4]<=[2,2,2]T(0,2,1), dimensions={0}
  ROOT %out = (s32[], /*index=1*/bf16[4,8]{1,0}) tuple(%i, %later)
}

%condition (x: (s32[], bf16[4,8])) -> pred[] {
  %x.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[4,8]{1,0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"58"}}
}
"""


def test_text_is_read_as_computations_calls_and_dependences():
    program = parse(SCHEDULED)
    assert program.entry == "main" and program.executions() == {"main": 1, "condition": 58, "body": 58}
    sources = depends_on(program.computations["body"])
    assert sources["later"] == {"moved", "a2a", "rows", "x"} and "product" not in sources["out"]
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing")


def test_bytes_go_to_the_outermost_axis_that_differs_and_loops_multiply_them():
    found = collectives(parse(SCHEDULED), MESH)
    first, second = found
    assert (first.axes, first.sent, first.times, first.dtype) == (("gpu",), {"gpu": 32.0}, 58, "bf16")
    assert (second.axes, second.sent) == (("node", "gpu"), {"node": 32.0, "gpu": 16.0})  # of 4: 2 on the other node, 1 beside, itself
    assert totals(found) == {"all-to-all": {"node": 58 * 32.0, "gpu": 58 * 48.0}}
    assert hidden(parse(SCHEDULED)) == (2, 1, 1, 0)


def test_products_of_the_other_pass_are_told_from_those_of_the_same():
    named = SCHEDULED.replace("dimensions={0}", 'dimensions={0}, metadata={op_name="branch_4_fun/jit(_forward)/mlp/all_to_all"}')
    for name, other in (("backward", 1), ("forward", 0), ("feed_forward", 0)):
        product = f'rhs_contracting_dims={{1}}, metadata={{op_name="branch_4_fun/jit(_{name})/dot_general"}}'
        assert hidden(parse(named.replace("rhs_contracting_dims={1}", product))) == (2, 1, 1, other)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,4},{1,5}}", [[0, 4], [1, 5]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['pipe'=1,'data'=2,'node'=2,'gpu'=2] {'data','gpu'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_form_of_groups(text, groups):
    np.testing.assert_array_equal(device_groups(text, MESH), groups)


def test_a_compiled_program_sends_what_its_collectives_say():
    mesh = make_mesh(MeshConfig(**MESH))

    def f(x):
        gathered = jax.lax.all_gather(x, "data", axis=0, tiled=True)
        cut = jax.lax.psum_scatter(gathered, ("node", "gpu"), scatter_dimension=0, tiled=True)
        passed = jax.lax.ppermute(cut, "node", [(0, 1)])
        return jax.lax.psum(passed, "gpu")

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(("data", "node", "gpu")), out_specs=P(("data", "node", "gpu")), check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 16, 5), jnp.float32)
    sent = totals(collectives(parse(jax.jit(mapped).lower(x).compile().as_text()), MESH))
    rows = 5 * 4  # bytes of a row; a device has 16 of them, then 32, then 8
    assert sent == {
        "all-gather": {"data": 16 * rows},
        "reduce-scatter": {"node": 16 * rows, "gpu": 8 * rows},
        "collective-permute": {"node": 8 * rows / 2},  # half of the devices send
        "all-reduce": {"gpu": 8 * rows},
    }


@pytest.mark.slow
def test_the_command_compiles_for_devices_that_are_not_there():
    done = run(
        "bench.compile", "--config=tests/micro_config.py", "--config.parallel.mesh.node=2", "--config.parallel.mesh.gpu=2",
        "--config.train.micro_batch_size=4", "--config.train.batch_size_start=4", "--config.data.num_shards=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if line}
    assert "4 devices" in done.stdout
    arguments = lines["arguments"]
    assert float(arguments[1]) == pytest.approx(float(arguments[3]), rel=0.05)  # what describe says: master and moments
    assert lines["all-to-all"][-1] == "MiB" and float(lines["all-to-all"][1]) > 0


def test_refusals_of_the_command():
    assert_refused(run("bench.compile", "--config=tests/micro_config.py", "--target=missing.txt"), "--target", "missing.txt")
    assert_refused(run("bench.compile", "--config=tests/micro_config.py", "--json=missing/x.json"), "--json", "missing")


@pytest.mark.slow
def test_scaling_gathers_each_parameter_once_whatever_the_mesh(tmp_path):
    sizes = [f"--config.train.{name}=8" for name in ("micro_batch_size", "batch_size", "batch_size_start")]
    out = tmp_path / "scaling.json"
    done = run("bench.scaling", "--config=tests/micro_config.py", "--host_devices=8", "--steps=1", f"--json={out}", *sizes)
    assert done.returncode == 0, done.stderr
    assert "Fake devices share the cores" in done.stdout
    meshes = json.loads(out.read_text())["meshes"]
    assert [one["devices"] for one in meshes] == [1, 2, 4, 8] and not meshes[0]["sent_bytes"]
    gathered = [sum(one["sent_bytes"]["all-gather"].values()) * one["devices"] / (one["devices"] - 1) for one in meshes[1:]]
    assert gathered == pytest.approx([gathered[0]] * 3, rel=1e-3)  # a norm that eight devices do not divide is cut in fewer parts
    assert [one["nll"] for one in meshes] == pytest.approx([meshes[0]["nll"]] * 4, rel=1e-6)
