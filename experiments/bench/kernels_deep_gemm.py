"""Times DeepGEMM's FP8 products, the peer that ours are compared with.

Runs in a process of its own, since a process has one reader of CUPTI; experiments.bench.kernels starts it where deep_gemm is installed:

    python -m experiments.bench.kernels_deep_gemm

The first line that it prints says what it is. Then for every line of JSON that it reads, such as
`{"kind": "dense", "m": 4096, "n": 7168, "k": 2048}`, it prints one: the median seconds of its kernels in a call with a cold L2 (`cold`) and
back to back (`warm`), how many kernels a call runs (their times are summed), and the relative error of the first rows. The scales lie as
its kernels read them, so that a call transforms nothing. Where it fails, it answers what was `refused` and ends: after an error of CUDA a
process can run nothing more. It shares the GPU with the process that asks, and needs up to 10 GB of it.
"""

import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from experiments.bench.torch_blocks import BLOCK, Blocks, draw, draw_scales, first_rows, operands, relative_error

REPEATS = 9
CLEARING = "FillFunctor"  # in the name of the kernel that clears L2


class Product(NamedTuple):
    """A call, and rows of its result with the operands that make them."""

    run: Callable[[], Any]
    out: torch.Tensor
    left: Blocks
    right: Blocks


def dense(m: int, n: int, k: int) -> Product:
    """1x128 by 128x128 scales, bfloat16."""
    import deep_gemm

    a, b = operands(m, n, k)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    return Product(lambda: deep_gemm.fp8_gemm_nt(a[:2], b[:2], out), *first_rows(out, a), b)


def grouped(owners: list[int], groups: int, n: int, k: int) -> Product:
    """The same for rows of several experts; `owners` has the expert of each 128 rows."""
    import deep_gemm

    m = BLOCK * len(owners)
    a = Blocks(draw(m, k), draw_scales(k // BLOCK, m).t(), 1)
    weights, scales = draw(groups, n, k), draw_scales(groups, -(-n // BLOCK), k // BLOCK)
    owner_of_row = torch.tensor(owners, dtype=torch.int32, device="cuda").repeat_interleave(BLOCK)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a[:2], (weights, scales), out, owner_of_row)

    return Product(run, *first_rows(out, a, BLOCK), Blocks(weights[owners[0]], scales[owners[0]], BLOCK))


def masked(groups: int, m: int, n: int, k: int) -> Product:
    """The same for as many rows of each expert, of which a call may use fewer: all are used."""
    import deep_gemm

    values, scales = draw(groups, m, k), draw_scales(groups, k // BLOCK, m).mT
    weights, of_weights = draw(groups, n, k), draw_scales(groups, -(-n // BLOCK), k // BLOCK)
    out, used = torch.empty(groups, m, n, dtype=torch.bfloat16, device="cuda"), torch.full((groups,), m, dtype=torch.int32, device="cuda")

    def run() -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_masked((values, scales), (weights, of_weights), out, used, m)

    return Product(run, *first_rows(out[0], Blocks(values[0], scales[0], 1)), Blocks(weights[0], of_weights[0], BLOCK))


def wgrad(m: int, n: int, k: int) -> Product:
    """1x128 by 1x128 scales, added to float32."""
    import deep_gemm

    a, b = (Blocks(draw(rows, k), draw_scales(k // BLOCK, rows).t(), 1) for rows in (m, n))
    out = torch.zeros(m, n, device="cuda")
    return Product(lambda: deep_gemm.fp8_gemm_nt(a[:2], b[:2], out, c=out, recipe=(1, 1, BLOCK)), *first_rows(out, a), b)


def grouped_wgrad(groups: int, m: int, n: int, k: int) -> Product:
    """The same for the tokens of each of several experts: a group's operands lie together, in one array of one axis."""
    import deep_gemm

    a, b = (draw(groups, rows, k) for rows in (m, n))
    a_scales, b_scales = (draw_scales(groups * k // BLOCK, rows).t() for rows in (m, n))
    out, depths = torch.zeros(groups, m, n, device="cuda"), [k] * groups
    depths_there = torch.tensor(depths, dtype=torch.int32, device="cuda")

    def run() -> None:
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous((a.view(-1), a_scales), (b.view(-1), b_scales), out, depths, depths_there, c=out)

    first, right = (Blocks(x[0], scales[:, : k // BLOCK], 1) for x, scales in ((a, a_scales), (b, b_scales)))
    return Product(run, *first_rows(out[0], first), right)


PRODUCTS: dict[str, Callable[..., Product]] = {
    "dense": dense,
    "grouped": grouped,
    "masked": masked,
    "wgrad": wgrad,
    "grouped wgrad": grouped_wgrad,
}


def error(product: Product) -> float:
    """Of the rows that are compared."""
    product.out.zero_()
    product.run()
    return relative_error(product.out, product.left, product.right)


def kernel_seconds(run: Callable[[], Any], cold: bool) -> tuple[float, int]:
    """Median time on the GPU of the kernels of a call, and how many they are; cold: after a write of a gigabyte."""
    clear = torch.empty(2**28, device="cuda") if cold else None
    steps = schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=steps, acc_events=True) as profiler:
        for _ in range(2):
            for _ in range(REPEATS):
                if clear is not None:
                    clear.fill_(1)
                run()
            torch.cuda.synchronize()
            profiler.step()
    return per_call(profiler.events())


def per_call(events: list[Any]) -> tuple[float, int]:
    """Median seconds of the kernels of a call, and how many they are. Raises RuntimeError where calls differ in kernels."""
    events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation and CLEARING not in e.name]
    kernels, rest = divmod(len(events), REPEATS)
    if not kernels or rest:
        raise RuntimeError(f"the profiler saw {len(events)} kernels in {REPEATS} calls")
    calls = itertools.batched(sorted(events, key=lambda e: e.time_range.start), kernels)
    return statistics.median(sum(e.time_range.elapsed_us() for e in call) for call in calls) / 1e6, kernels


def answer(kind: str, **sizes: Any) -> dict[str, Any]:
    """The answer to a question."""
    torch.manual_seed(0)
    product = PRODUCTS[kind](**sizes)
    relative = error(product)  # the first call, which compiles
    (cold, kernels), (warm, _) = (kernel_seconds(product.run, clear) for clear in (True, False))
    return {"cold": cold, "warm": warm, "kernels": kernels, "error": relative}


def main() -> None:
    # DeepGEMM's compiler speaks on standard output, which is for answers: what it says goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import deep_gemm

    print(f"DeepGEMM {deep_gemm.__version__}, torch {torch.__version__}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
        except Exception as reason:  # whatever the peer raises, its row says it
            print(json.dumps({"refused": (str(reason).splitlines() or [type(reason).__name__])[0]}), file=answers, flush=True)
            return
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
