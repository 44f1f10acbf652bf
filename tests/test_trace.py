"""Time of collectives that other kernels run beside, and the command that trains on several meshes."""

import json
import re

import jax
import numpy as np
import pytest

from experiments.bench.trace import Kernels, both, by_name, draw, kernel_table, kernel_times, length, overlap, union
from tests.test_cli import assert_refused, run


def test_spans_against_counting_milliseconds():
    rng = np.random.default_rng(0)
    a, b = (np.stack([start := rng.integers(0, 80, 12), start + rng.integers(0, 9, 12)], 1).astype(float) for _ in range(2))
    covered = [np.array([any(s <= t < e for s, e in spans) for t in range(100)]) for spans in (a, b)]
    assert length(a) == covered[0].sum() and both(a, b) == (covered[0] & covered[1]).sum()
    assert (np.diff(union(a).ravel())[1::2] > 0).all()


def test_a_collective_is_hidden_only_beside_what_is_none():
    names = ["gemm", "ncclDevKernel_SendRecv(x)", "ncclDevKernel_AllGather_RING_LL(x)", "fusion"]
    kernels = Kernels(names, np.array([[0, 4], [3, 9], [8, 12], [20, 21]], float))
    assert overlap([kernels]) == (13, 9, 1, 6, 1)
    assert by_name([kernels, kernels]) == {"ncclDevKernel_SendRecv": 6, "gemm": 4, "ncclDevKernel_AllGather_RING_LL": 4, "fusion": 1}
    lanes = draw({"GPU:0": kernels, "GPU:1": kernels}, "", 10).axes[0]
    assert lanes.get_xlim() == (0, 10) and [text.get_text() for text in lanes.get_yticklabels()] == ["GPU:0", "GPU:1"]


def test_kernels_beyond_the_longest_are_in_one_row_and_all_add_up():
    rows = [line.split() for line in kernel_table("bf16", {"gemm": 3.0, "copy": 0.75, "fusion": 0.25}, most=1).splitlines()[2:]]
    assert rows == [["gemm", "3.00", "75.0%"], ["others", "1.00", "25.0%"], ["all", "4.00", "100.0%"]]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU to trace")
def test_without_a_gpu_nothing_is_run_for_its_kernels():
    assert kernel_times(lambda: pytest.fail("was run")) == {}


@pytest.mark.slow
def test_variants_train_on_the_same_rows(tmp_path):
    sizes = [f"--config.train.{name}={size}" for name, size in (("micro_batch_size", 2), ("batch_size", 8), ("batch_size_start", 8))]
    out = tmp_path / "meshes.json"
    variants = ["--variant=one", "--variant=two: parallel.mesh.gpu=2 parallel.dispatch_bound=2.0", "--variant=pipe: parallel.mesh.pipe=2"]
    done = run("bench.meshes", "--config=tests/micro_config.py", "--host_devices=2", "--steps=4", f"--json={out}", *variants, *sizes)
    assert done.returncode == 0, done.stderr
    one, two, pipe = json.loads(out.read_text())["variants"].values()
    assert one["losses"][0] > one["losses"][-1]
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(pipe["losses"], one["losses"], rtol=1e-5)
    assert sum(two["sent_bytes"]["all-to-all"].values()) > 0 and one["trace"] is None


@pytest.mark.slow
def test_transports_send_what_the_plan_says():
    sizes = ("--config.train.sequence_length=64", "--config.model.hidden_size=4096")
    done = run("bench.transports", "--config=tests/micro_config.py", "--host_devices=2", "--config.parallel.mesh.gpu=2", *sizes)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\S.*?)  +([\d.]+) MB  +([\d.]+) MB", done.stdout, flags=re.MULTILINE)
    sent = {name: (float(sends), float(needs)) for name, sends, needs in found}
    rows = 64  # that a device has; the worst case is a copy of each to the other device
    assert sent["lax.all_to_all, bfloat16"] == (round(rows * 4096 * 2 / 1e6, 1),) * 2
    assert sent["combine, bf16, bound None"][0] == round(rows * 4096 * 4 / 1e6, 1)
    for way in ("dispatch, bf16", "dispatch, fp8", "combine, bf16"):
        whole, bounded = (sent[f"{way}, bound {bound}"] for bound in (None, 1.5))
        assert bounded[0] <= whole[0] and 0 < whole[1] <= whole[0] and whole[1] == bounded[1]
    assert sent["dispatch, fp8, bound None"][0] < 0.3 * sent["dispatch, bf16, bound None"][0]


def test_refusals():
    command = ("bench.meshes", "--config=tests/micro_config.py")
    assert_refused(run(*command), "--variant")
    assert_refused(run(*command, "--variant=a: parallel.mesh.gpus=2"), "config.parallel.mesh.gpus")
    assert_refused(run(*command, "--variant=a: gpu"), "--variant")
    assert_refused(run("bench.transports", "--config=tests/micro_config.py"), "config.parallel.mesh")
