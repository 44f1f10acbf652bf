"""Our model against transformers' `DeepseekV3ForCausalLM`, on the golden files of tests/golden (its README says what they hold)."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.interop.hf_config import model_config_from_hf
from dsv3_jax.interop.huggingface import params_from_hf
from dsv3_jax.interop.layout import checkpoint_layout
from dsv3_jax.interop.safetensors import CheckpointError
from dsv3_jax.model.loss import compute_losses, objective, target_counts
from dsv3_jax.model.mtp import predict_ahead
from dsv3_jax.model.transformer import Execution, Params, RouterBias, logits, trunk

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = (
    "compressed_grouped", "uncompressed_ungrouped", "yarn", "yarn_unequal_mscales", "yarn_no_mscales", "linear_rope",
    "half_rope_theta", "unnormalised_gates", "tied_shared_experts", "gradients", "mtp",
)  # fmt: skip
MTP_LOSS_WEIGHT = 0.3  # of the gradients in mtp.npz
TOLERANCE = 1e-4
# Compilation is nearly all the time that these tests take.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file: what it stores, and the same as our model takes it."""

    config_json: dict
    arrays: dict[str, np.ndarray]
    config: ModelConfig
    params: Params
    bias: RouterBias

    @property
    def tokens(self) -> jax.Array:
        return jnp.asarray(self.arrays["input_ids"])

    def named(self, kind: str) -> dict[str, np.ndarray]:
        """The arrays `kind/NAME` by NAME."""
        return {name.removeprefix(f"{kind}/"): value for name, value in self.arrays.items() if name.startswith(f"{kind}/")}


@functools.cache
def golden(case: str) -> Golden:
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    config_json = json.loads(str(arrays.pop("config")))
    config = model_config_from_hf(config_json)
    tensors = {name.removeprefix("tensor/"): value for name, value in arrays.items() if name.startswith("tensor/")}
    return Golden(config_json, arrays, config, *params_from_hf(tensors, config))


@pytest.fixture(autouse=True)
def exact_products():
    """On a GPU, float32 products would otherwise be made of fewer bits."""
    with jax.default_matmul_precision("highest"):
        yield


def assert_equal_values(ours: jax.Array, theirs: np.ndarray, what: str) -> None:
    difference = np.asarray(ours, np.float64) - theirs
    assert difference.shape == theirs.shape
    assert np.abs(difference).max() <= TOLERANCE * np.abs(theirs).max(), f"{what}: largest difference"
    assert np.linalg.norm(difference) <= TOLERANCE * np.linalg.norm(theirs), f"{what}: Frobenius norm"


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    g = golden(case)

    @quick_jit
    def forward(params: Params, bias: RouterBias, tokens: jax.Array) -> jax.Array:
        return logits(params, trunk(params, bias, tokens, g.config, Execution(impl="reference")).hidden)

    assert_equal_values(forward(g.params, g.bias, g.tokens), g.arrays["logits"], "logits")


def test_mtp_logits():
    g, execution = golden("mtp"), Execution(impl="reference")

    @quick_jit
    def forward(params: Params, bias: RouterBias, rows: jax.Array) -> jax.Array:
        hidden = trunk(params, bias, rows[:, :-1], g.config, execution).hidden
        (depth_1,) = predict_ahead(params, bias, hidden, rows, g.config, execution)
        return logits(params, depth_1.hidden)

    assert_equal_values(forward(g.params, g.bias, g.tokens), g.arrays["mtp_logits"], "MTP logits")


@pytest.mark.parametrize(("case", "remat"), [("gradients", "none"), ("mtp", "none"), ("mtp", "selective"), ("mtp", "full")])
def test_gradients(case, remat):
    g, execution = golden(case), Execution(impl="reference", remat=remat)

    @quick_jit
    @jax.grad
    def gradient(params: Params) -> jax.Array:
        losses = compute_losses(params, g.bias, g.tokens, g.config, execution)
        return objective(losses, target_counts(g.tokens, g.config, execution), MTP_LOSS_WEIGHT, balance_weight=0.0)

    # The router bias has no gradient; zeros complete the set of tensors.
    no_gradient = {name: np.zeros_like(value) for name, value in g.named("tensor").items() if name.endswith("e_score_correction_bias")}
    theirs, _ = params_from_hf(g.named("gradient") | no_gradient, g.config)
    ours = gradient(g.params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, leaf in jax.tree.leaves_with_path(theirs):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.abs(leaf).max() > 0, f"{name} has no gradient to compare"
        value = functools.reduce(lambda node, key: node[key.key], path, ours)
        assert_equal_values(value, np.asarray(leaf, np.float64), name)


def test_layout_names_every_tensor_once_and_fills_every_parameter():
    g = golden("mtp")
    pieces = checkpoint_layout(g.config)
    assert sorted(piece.tensor for piece in pieces) == sorted(g.named("tensor"))
    assert sum(np.prod(piece.shape) for piece in pieces) == sum(leaf.size for leaf in jax.tree.leaves((g.params, g.bias)))


def test_copies_of_embedding_and_head_are_left_out():
    g = golden("mtp")
    tensors = g.named("tensor")
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    copied = {f"model.layers.2.{name}.weight": tensors[original] for name, original in copies.items()}
    assert_same_tree(params_from_hf(tensors | copied, g.config), (g.params, g.bias))
    tied = golden("tied_shared_experts")
    head = {"lm_head.weight": tied.named("tensor")["model.embed_tokens.weight"]}
    assert_same_tree(params_from_hf(tied.named("tensor") | head, tied.config), (tied.params, tied.bias))


def assert_same_tree(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_tensor_that_cannot_be_used_is_named():
    g = golden("compressed_grouped")
    tensors, name = g.named("tensor"), "model.layers.2.mlp.experts.7.up_proj.weight"
    missing = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(
        CheckpointError, match=re.escape(f"{name}: is missing from the checkpoint; config.json asks for it with shape (5, 20)")
    ):
        params_from_hf(missing, g.config)
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: has shape (20, 5), config.json asks for (5, 20)")):
        params_from_hf(tensors | {name: tensors[name].T}, g.config)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.bias: is not a tensor"):
        params_from_hf(tensors | {"model.layers.0.mlp.bias": np.zeros(3)}, g.config)


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1: only 3"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy': only 'noaux_tc'"),
        ({"sliding_window": 128}, "sliding_window = 128: this field"),
        ({"hidden_size": "20"}, "model.hidden_size = '20': must be int"),
        ({"n_group": 5}, "model.n_routed_experts = 12: must be a multiple"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type = .*'dynamic'.* one of default, linear, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None: is needed for linear"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_scaling.mscale = 1.0: is not implemented for linear"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "rope_scaling.attention_factor = 1.2: is not implemented"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 0}}, "rope_scaling.mscale = .*give mscale and mscale_all_dim both"),
        ({"rope_scaling": None, "rope_parameters": YARN | {"truncate": False}}, "rope_parameters.truncate = False: is not implemented"),
        ({"rope_scaling": YARN, "rope_parameters": YARN}, "rope_parameters = .*keep one"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        model_config_from_hf(golden("compressed_grouped").config_json | change)


def test_a_missing_field_is_named():
    config_json = golden("compressed_grouped").config_json
    with pytest.raises(ConfigError, match="kv_lora_rank = None: is missing"):
        model_config_from_hf({name: value for name, value in config_json.items() if name != "kv_lora_rank"})
