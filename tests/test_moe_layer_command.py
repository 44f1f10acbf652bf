"""The benchmark of a MoE layer: what it computes, and what it takes the kernels of a profile for."""

import jax
import pytest

from dsv3_jax.config import from_config_dict
from experiments.bench.moe_kinds import DISPATCH, NUMBERS, OTHER, PRODUCTS, gathers_to_dispatch, kind_of, kind_table, layer, operands
from tests import micro_config
from tests.test_cli import run

# As XLA writes it: a sum of rows fused into another one, which is the root; the gradient of SwiGLU, which reads a product's
# result; a product that reads what SwiGLU made; a cast; a sum of a product's parts.
COMPILED = """HloModule jit_both_ways

%fused_add (p0: bf16[8,4], p1: s32[8]) -> bf16[8,4] {
  %p0 = bf16[8,4] parameter(0)
  %p1 = s32[8] parameter(1)
  %gather.1 = bf16[8,4] gather(%p0, %p1), metadata={op_name="jit(f)/transpose(jvp(combine))/gather"}
  ROOT %add.1 = bf16[8,4] add(%gather.1, %p0), metadata={op_name="jit(f)/transpose(jvp())/add_any"}
}

%fused_swiglu (p0.2: bf16[8,4]) -> bf16[8,4] {
  %p0.2 = bf16[8,4] parameter(0)
  %bitcast.1 = bf16[8,4] bitcast(%p0.2), metadata={op_name="jit(f)/jvp(jit(multiply))/bf16_product_rows/mpmd_map"}
  ROOT %multiply.1 = bf16[8,4] multiply(%bitcast.1, %p0.2), metadata={op_name="jit(f)/transpose(jvp(swiglu))/mul"}
}

%fused_gemm (p0.3: bf16[8,4]) -> bf16[8,4] {
  ROOT %p0.3 = bf16[8,4] parameter(0), metadata={op_name="jit(f)/transpose(jvp(swiglu))/concatenate"}
}

%fused_sum (p0.4: bf16[8,4]) -> bf16[8,4] {
  ROOT %p0.4 = bf16[8,4] parameter(0), metadata={op_name="jit(f)/transpose(jvp())/dot_general"}
}

ENTRY %main (a: bf16[8,4], b: s32[8]) -> bf16[8,4] {
  %a = bf16[8,4] parameter(0)
  %b = s32[8] parameter(1)
  %loop_add_fusion.1 = bf16[8,4] fusion(%a, %b), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/transpose(jvp())/add_any"}
  %loop_multiply_fusion = bf16[8,4] fusion(%a), kind=kLoop, calls=%fused_swiglu
  %gemm_fusion_dot.2 = bf16[8,4] fusion(%a), kind=kCustom, calls=%fused_gemm
  %wrapped_convert = bf16[8,4] fusion(%a), kind=kLoop, calls=%fused_gemm, metadata={op_name="jit(f)/jvp(cast_weights)/convert_element_type"}
  ROOT %loop_reduce_fusion = bf16[8,4] fusion(%a), kind=kLoop, calls=%fused_sum
}
"""


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("loop_add_fusion_1", DISPATCH),
        ("void cub::_V_SM_1200::detail::radix_sort::DeviceRadixSortOnesweepKernel<int>(int)", DISPATCH),
        ("loop_multiply_fusion", NUMBERS),
        ("wrapped_convert", NUMBERS),
        ("retile_mosaic_gpu_kernel", NUMBERS),
        ("gemm_fusion_dot_2", PRODUCTS),
        ("loop_reduce_fusion", PRODUCTS),
        ("fp8_product_contraction_mosaic_gpu_kernel", PRODUCTS),
        ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", PRODUCTS),
        ("Memset 3", OTHER),
    ],
)
def test_what_a_kernel_is_for(kernel, kind):
    assert kind_of(COMPILED)(kernel) == kind


def test_gathers_within_quantizers_are_dispatch():
    moved = gathers_to_dispatch({PRODUCTS: 4.0, NUMBERS: 2.0, DISPATCH: 1.0}, 0.25)
    assert moved == {PRODUCTS: 4.0, NUMBERS: 1.75, DISPATCH: 1.25}


def test_the_ratio_without_dispatch():
    lines = kind_table({PRODUCTS: 6.0, NUMBERS: 2.0, DISPATCH: 2.0}, {PRODUCTS: 4.0, NUMBERS: 1.0, DISPATCH: 1.0, OTHER: 1.0}).splitlines()
    found = {line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in lines if "all" in line}
    assert found == {"all": ["10.00", "7.00", "1.43"], "all but dispatch": ["8.00", "6.00", "1.33"]}


@pytest.mark.parametrize("policy", ["bf16", "fp8"])
def test_the_layer_names_what_moves_rows_and_what_activates(policy):
    config = from_config_dict(micro_config.get_config())
    arguments = jax.eval_shape(lambda: operands(config))
    compiled = layer(config, policy).lower(*arguments).compile()
    x, weights, routing, _ = arguments
    y, gradients = compiled.out_info
    assert [a.shape for a in jax.tree.leaves((y, gradients))] == [a.shape for a in jax.tree.leaves((x, x, weights, routing.gates))]
    text = compiled.as_text()
    assert all(scope in text for scope in ("dispatch", "combine", "swiglu"))


@pytest.mark.slow
def test_the_command():
    done = run("bench.moe_layer", "--config=tests/micro_config.py", "--repeats=5")
    assert done.returncode == 0, done.stderr
    assert "FP8 is" in done.stdout
