"""Counts of parameters, FLOPs and bytes against the model itself: its arrays, its traced products, what autodiff and XLA keep."""

import dataclasses
import importlib
import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from dsv3_jax.config import Config, MeshConfig, ModelConfig, from_config_dict
from dsv3_jax.model import moe
from dsv3_jax.model.init import init_router_bias, parameter_shapes
from dsv3_jax.model.loss import compute_losses, objective, target_counts
from dsv3_jax.model.moe import block_rows
from dsv3_jax.model.transformer import Block, Execution, rematerialised, token_context
from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.parallel.ticks import lower
from dsv3_jax.precision.formats import E5M6
from dsv3_jax.precision.policy import Recipe
from dsv3_jax.training import accounting
from tests import small


def load(name: str) -> Config:
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def change(config: Config, **sections: dict[str, Any]) -> Config:
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()})


def test_v3_has_the_published_sizes():
    counts = accounting.count_parameters(load("v3_671b").model)
    assert [round(count / 1e9, 2) for count in counts] == [671.03, 37.55, 11.61]


@pytest.mark.parametrize(("name", "billions"), [("ablation_16b", 15.7), ("ablation_230b", 235.7), ("colab", 0.1)])
def test_other_sizes(name: str, billions: float):
    assert round(accounting.count_parameters(load(name).model).total / 1e9, 1) == billions


def test_h200_has_two_to_three_billion_parameters():
    counts = accounting.count_parameters(load("h200").model)
    assert 2e9 < counts.total < counts.total + counts.mtp < 3e9


@pytest.mark.parametrize(
    "model",
    [
        load("tiny").model,
        small.model(num_nextn_predict_layers=0),
        small.model(tie_word_embeddings=True, q_lora_rank=None, num_nextn_predict_layers=2),
    ],
    ids=["tiny", "no MTP", "tied, MTP depth 2"],
)
def test_counts_against_the_arrays_of_a_model(model: ModelConfig):
    params, _ = small.parameters(model)
    mtp = sum(leaf.size for leaf in jax.tree.leaves(params.pop("mtp", {})))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    experts = params["moe"]["mlp"]["experts"]
    idle = sum(leaf[:, model.num_experts_per_tok :].size for leaf in experts.values())
    assert accounting.count_parameters(model) == (total, total - idle, mtp)


def test_parts_without_experts():
    model = dataclasses.replace(load("tiny").model, first_k_dense_replace=4, num_nextn_predict_layers=0, n_routed_experts=0)
    counts = accounting.count_parameters(model)
    assert counts.total == counts.activated and counts.mtp == 0


def product_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a traced function, loops included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value if hasattr(value, "eqns") else None)
            if inner is not None:
                total += product_flops(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "num_nextn_predict_layers": 2}, {"first_k_dense_replace": 3}])
def test_flops_against_the_products_of_the_traced_model(changes: dict[str, Any]):
    length = 12  # so few pairs that blocks have one row and no padding
    model = small.model(**changes)
    params, bias = parameter_shapes(model), jax.eval_shape(lambda: init_router_bias(model))
    rows = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    traced = jax.make_jaxpr(lambda p, b, r: compute_losses(p, b, r, model, Execution()).main.nll)(params, bias, rows)
    flops = accounting.training_flops(model, length)
    # The reference computes all T scores of a token, of which the formula counts the (T + 1) / 2 that causality leaves.
    attention = (flops.attention + flops.mtp_attention) * 2 * length / (length + 1)
    expected = length * (flops.products + flops.mtp_products + attention) / 3
    assert product_flops(traced.jaxpr) == pytest.approx(expected, rel=1e-3)  # the balance loss adds one small product


def test_published_hours():
    config = load("v3_671b")
    utilisation = accounting.published_utilisation()
    flops = accounting.model_flops_per_token(config)
    assert accounting.h800_hours(14.8e12, flops, utilisation) == pytest.approx(2664e3)
    assert accounting.h800_hours(14.8e12, flops, 2 * utilisation) == pytest.approx(1332e3)
    assert 0.35 < utilisation < 0.45
    assert flops == pytest.approx(6 * (37.55e9 - 0.93e9 + 1.61e9) + 62 * 3 * 128 * 320 * 4097, rel=1e-3)


def test_cache_of_v3():
    model = ModelConfig()
    assert accounting.cache_bytes_per_token(model) == 61 * 576 * 2
    assert accounting.mha_bytes_per_token(model) == 61 * 32768 * 2


def kept_by_autodiff(config: Config, is_moe: bool) -> int:
    """Bytes that depend on the input of a layer among the residuals of its traced `vjp`."""
    model, train = config.model, config.train
    shape = (train.micro_batch_size, train.sequence_length)
    execution = Execution(train.compute_dtype, "reference", train.remat, recipe=Recipe.of(config.precision))
    context = token_context(jnp.zeros(shape, jnp.int32), execution)
    stack = parameter_shapes(model)["moe" if is_moe else "dense"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
    x = jax.ShapeDtypeStruct((*shape, model.hidden_size), train.compute_dtype)
    block = Block(model, execution, is_moe)
    layer = rematerialised(lambda x, p, b: block.apply({"params": p}, x, b, context), train.remat)
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(layer, *args)[1]))(x, params, jnp.zeros(model.n_routed_experts)).jaxpr
    reached = {jaxpr.invars[0]}
    for equation in jaxpr.eqns:
        if any(isinstance(v, jax.extend.core.Var) and v in reached for v in equation.invars):
            reached |= set(equation.outvars)
    kept = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var) and v in reached}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


@pytest.mark.parametrize("policy", ["bf16", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_moe", [False, True])
@pytest.mark.parametrize(("remat", "tolerance"), [("none", 0.1), ("selective", 0.0), ("full", 0.0)])
def test_activations_of_a_layer_against_autodiff(
    policy: str, dtype: str, is_moe: bool, remat: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(moe, "block_rows", lambda pairs, experts, backend: block_rows(pairs, experts, "gpu"))  # what is counted is a GPU's
    train = {"compute_dtype": dtype, "remat": remat, "micro_batch_size": 2, "sequence_length": 128}
    config = change(load("tiny"), train=train, precision={"impl": "reference", "policy": policy})
    predicted = sum(accounting.layer_activations(config, is_moe, remat).values())
    assert predicted == pytest.approx(kept_by_autodiff(config, is_moe), rel=tolerance)


def test_fp8_keeps_half_of_what_bfloat16_keeps_and_casts_kernels_to_one_byte():
    plain = load("h200")
    fp8 = change(plain, precision={"policy": "fp8"})
    of_rows = accounting.product_input_bytes
    assert (of_rows(plain, 256, 200), of_rows(fp8, 256, 200), of_rows(fp8, 256, 200, E5M6)) == (102400, 53248, 104448)
    blocks = change(fp8, precision={"activation_tile": "128x128"})
    assert of_rows(blocks, 256, 200) == 256 * 200 + 4 * 4
    held, held_fp8 = ({item.kind: item for item in accounting.device_memory(config)} for config in (plain, fp8))
    joined = 4096 * 2048  # eh_proj stays in bfloat16
    assert held_fp8["weights"].whole == (held["weights"].whole - 2 * joined) // 2 + 2 * joined
    assert "E4M3" in held_fp8["weights"].note


def test_fp8_kernels_keep_tokens_and_the_reference_rows_of_experts():
    fp8 = change(load("h200"), precision={"policy": "fp8"})
    kept = lambda config: accounting.layer_activations(config, True, "none")["expert_inputs"]  # noqa: E731
    tokens = fp8.train.micro_batch_size * fp8.train.sequence_length
    assert kept(fp8) == accounting.product_input_bytes(fp8, tokens, 2048)
    assert kept(change(fp8, precision={"impl": "reference"})) > 8 * kept(fp8)
    assert kept(change(fp8, precision={"activation_tile": "128x128"})) > 7 * kept(fp8)  # which the kernels do not take
    spread = change(fp8, parallel={"mesh": MeshConfig(gpu=8)})
    assert kept(spread) == 8 * kept(fp8)  # each of 8 devices has room for all tokens of the others
    others = lambda config: accounting.layer_activations(config, True, "none")["quantized_inputs"]  # noqa: E731
    assert others(spread) - others(fp8) == kept(fp8)  # which shared experts keep too where they are not the same


def test_peak_memory_against_xla():
    config = change(
        load("tiny"),
        model={"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "num_hidden_layers": 8},
        train={"micro_batch_size": 2, "remat": "selective"},
    )
    model, execution = config.model, Execution.of(config, 0)

    def loss(params: Any, bias: Any, rows: Any) -> Any:
        return objective(compute_losses(params, bias, rows, model, execution), target_counts(rows, model, execution), 0.3, 1e-4)

    params, bias = parameter_shapes(model), jax.eval_shape(lambda: init_router_bias(model))
    rows = jax.ShapeDtypeStruct((2, config.train.sequence_length + 1), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(params, bias, rows).compile({"xla_backend_optimization_level": 0})
    held = {item.kind: item.whole for item in accounting.device_memory(config)}
    predicted = held["activations"] + held["recomputed"]
    assert 0.7 < predicted / compiled.memory_analysis().temp_size_in_bytes < 1.4


def test_memory_of_each_kind():
    config = change(load("h200"), train={"remat": "full"}, parallel={"mesh": dataclasses.replace(load("h200").parallel.mesh, data=4)})
    counts = accounting.count_parameters(config.model)
    parameters, head = counts.total + counts.mtp, 2048 * 32768
    items = {item.kind: item for item in accounting.device_memory(config)}
    assert items["master"].per_device == items["moments"].per_device == parameters  # four bytes each, over four devices
    assert items["gathered"].per_device == 4 * parameters
    assert items["gradients"].per_device == 8 * parameters + 4 * head
    inputs = (12 + 2) * 8 * 4096 * 2048 * 2  # of 12 layers, and hidden state and embedding of the MTP module
    assert items["activations"].whole == inputs + 2 * 8 * 4096 * 2048 * 2
    assert items["activations"].per_device == items["activations"].whole // 4
    attention = 2048 * 512 + 512 * 32 * 192 + 2048 * 576 + 512 * 32 * 256 + 32 * 128 * 2048
    assert items["weights"].per_device == 2 * (attention + 65 * 3 * 2048 * 512 + 4096 * 2048)  # the MTP module, its router is float32
    assert accounting.ema_bytes(config) == 0
    assert accounting.ema_bytes(change(config, train={"ema_decay": 0.9})) == 4 * parameters


def test_memory_of_v3_on_a_pipeline():
    """DualPipe on 16 ranks of 64 devices, twice: 61 layers on 16 stages, of which a rank runs two, each with room for 4 + 3."""
    mesh, v3 = MeshConfig(pipe=16, data=2, node=8, gpu=8), load("v3_671b")
    config = change(v3, train={"micro_batch_size": 128, "batch_size": 128 * 40, "remat": "full"}, parallel={"mesh": mesh})
    parts, items = accounting.parameter_parts(config.model), {item.kind: item for item in accounting.device_memory(config)}

    def layer(section: str) -> int:
        of_section = [part for part in parts if part.section == section]
        return sum(part.parameters // part.layers // (64 if part.name == "routed experts" else 1) for part in of_section)

    own, shared = 4 * layer("moe") + 3 * layer("dense"), sum(map(layer, ("embed", "norm", "lm_head", "mtp")))
    assert items["gathered"].per_device == 4 * (2 * own + shared)
    assert items["gradients"].per_device == 4 * (2 * own + shared + own + shared + 7168 * 129280)
    assert items["master"].per_device == pytest.approx(4 * (671.03e9 + 11.61e9) / 2048, rel=1e-2)  # a few small ones are cut less
    kept = 16 + 1 + 1  # micro-batches of which layers keep their inputs, and a slot that nobody reads
    inputs = (4 + 3) * kept + 2 + 2 + (16 + 2 + 2) + kept  # of layers, the MTP module and both heads; of stages, with their outputs
    gradients = lower(make_schedule("dualpipe", 16, 40)).slots["gradient"]
    assert items["activations"].per_device == (inputs + gradients) * 4096 * 7168 * 2
    longer = change(config, train={"batch_size": 128 * 120})
    assert accounting.device_memory(longer) == accounting.device_memory(config)  # it follows P, not M
