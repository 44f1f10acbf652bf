"""Public checkpoints in and out: bit-exact round trips, parity of what is loaded, interruption, and broken folders."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.interop import store as store_module
from dsv3_jax.interop.export import export
from dsv3_jax.interop.huggingface import open_public, read_config
from dsv3_jax.interop.safetensors import CheckpointError, read_folder
from dsv3_jax.interop.store import Store, convert, open_weights
from dsv3_jax.interop.weights import ArraySource, load_params, read_as, whole_index
from dsv3_jax.model.mtp import predict_ahead
from dsv3_jax.model.transformer import Execution, logits, trunk
from dsv3_jax.parallel.mesh import make_mesh
from tests.interop.folders import golden, public_folder, tensors_of, write_public

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
EXACT = Execution(impl="reference")


def assert_same_tensors(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        value = tensor.read() if hasattr(tensor, "read") else tensor
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert ours[name].read().tobytes() == value.tobytes(), name


def to_store(tmp_path, case, dtype="source"):
    folder = public_folder(tmp_path / "public", case)
    convert(open_public(folder), folder, tmp_path / "store", dtype)
    return folder, Store(tmp_path / "store")


@pytest.mark.parametrize("case", ["mtp", "tied_shared_experts", "uncompressed_ungrouped", "fp8", "fp8_uncompressed"])
def test_round_trip_is_bit_exact(tmp_path, case):
    folder, store = to_store(tmp_path, case)
    export(store, tmp_path / "back", "source", {}, store.folder, read_config(store.folder), store.copies, 80_000)
    assert_same_tensors(read_folder(tmp_path / "back"), read_folder(folder))
    assert read_config(tmp_path / "back") == read_config(folder)


def test_copies_of_embedding_and_head_come_back(tmp_path):
    arrays = golden("mtp")
    tensors, config = tensors_of(arrays), json.loads(str(arrays["config"]))
    layer = f"model.layers.{config['num_hidden_layers']}"
    copies = {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight", f"{layer}.shared_head.head.weight": "lm_head.weight"}
    folder = write_public(tmp_path / "public", config, tensors | {name: tensors[of] for name, of in copies.items()})
    convert(open_public(folder), folder, tmp_path / "store", "source")
    store = Store(tmp_path / "store")
    export(store, tmp_path / "back", "source", {}, store.folder, read_config(store.folder), store.copies)
    assert_same_tensors(read_folder(tmp_path / "back"), read_folder(folder))
    other = write_public(tmp_path / "other", config, tensors | {f"{layer}.embed_tokens.weight": tensors["lm_head.weight"]})
    with pytest.raises(CheckpointError, match=r"must be a copy of model\.embed_tokens\.weight"):
        open_public(other)


def main_logits(source, tokens, dtype="float32"):
    params, bias = load_params(source, dtype, ONE)
    execution = Execution(dtype=dtype, impl="reference")
    return jax.jit(lambda p, b, t: logits(p, trunk(p, b, t, source.config, execution).hidden))(params, bias, jnp.asarray(tokens))


def assert_close(ours, theirs, tolerance=1e-4):
    difference = np.asarray(ours, np.float64) - theirs
    assert np.abs(difference).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["fp8", "fp8_uncompressed"])
def test_fp8_weights_give_the_logits_of_transformers(tmp_path, case):
    arrays = golden(case)
    folder, store = to_store(tmp_path, case)
    for source in (open_public(folder), store):
        assert_close(main_logits(source, arrays["input_ids"]), arrays["logits"])


def test_mtp_layer_of_an_fp8_checkpoint(tmp_path):
    arrays = golden("fp8")
    source = open_public(public_folder(tmp_path / "public", "fp8"))
    params, bias = load_params(source, "float32", ONE)
    rows = jnp.asarray(arrays["input_ids"])

    @jax.jit
    def forward(params, bias, rows):
        hidden = trunk(params, bias, rows[:, :-1], source.config, EXACT).hidden
        (ahead,) = predict_ahead(params, bias, hidden, rows, source.config, EXACT)
        return logits(params, ahead.hidden)

    assert_close(forward(params, bias, rows), arrays["mtp_logits"])


def test_dequantized_store_equals_loading_fp8(tmp_path):
    folder, store = to_store(tmp_path, "fp8", "float32")
    assert {store.stored_dtype(path).name for path in store.arrays} == {"float32"}
    theirs = load_params(open_public(folder), "float32", ONE)
    jax.tree.map(np.testing.assert_array_equal, load_params(store, "float32", ONE), theirs)
    export(store, tmp_path / "back", "source", {}, store.folder, read_config(store.folder), store.copies)
    assert "quantization_config" not in read_config(tmp_path / "back")


def test_each_device_reads_only_its_part(tmp_path, monkeypatch):
    _, store = to_store(tmp_path, "fp8")
    mesh = make_mesh(MeshConfig(data=4))
    whole = load_params(store, "float32", ONE)
    largest = 0
    read = Store.read

    def counted(self, path, index):
        nonlocal largest
        out = read(self, path, index)
        if path == "params/moe/mlp/experts/down_proj":
            largest = max(largest, out.size)
        return out

    monkeypatch.setattr(Store, "read", counted)
    shape = whole[0]["moe"]["mlp"]["experts"]["down_proj"].shape
    path, by_expert = "params/moe/mlp/experts/down_proj", NamedSharding(mesh, P(None, "data"))
    part = lambda index: read_as(store, path, whole_index(index, shape), np.dtype(np.float32))  # noqa: E731
    array = jax.make_array_from_callback(shape, by_expert, part)
    assert largest == np.prod(shape) // 4
    np.testing.assert_array_equal(array, whole[0]["moe"]["mlp"]["experts"]["down_proj"])


def test_interrupted_conversion_goes_on_and_never_looks_whole(tmp_path, monkeypatch):
    folder = public_folder(tmp_path / "public", "fp8")
    public, target = open_public(folder), tmp_path / "store"
    whole = store_module._convert_piece
    seen = []

    def failing(public, piece, stores):
        if len(seen) == 20:
            raise KeyboardInterrupt
        seen.append(piece.tensor)
        whole(public, piece, stores)

    monkeypatch.setattr(store_module, "_convert_piece", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(public, folder, target, "source")
    assert not target.exists()
    with pytest.raises(CheckpointError, match="not finished"):
        open_weights(tmp_path / "store.partial")
    first = list(seen)
    monkeypatch.setattr(store_module, "_convert_piece", lambda *a: (seen.append(a[1].tensor), whole(*a)))
    with pytest.raises(ConfigError, match=r"store\.partial is left over from another conversion"):
        convert(public, folder, target, "float32")
    convert(public, folder, target, "source")
    assert len(seen) == len(set(seen)) > len(first) and seen[:20] == first
    jax.tree.map(np.testing.assert_array_equal, load_params(Store(target), "float32", ONE), load_params(public, "float32", ONE))
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        convert(public, folder, target, "source")


def test_a_lost_chunk_is_no_zero(tmp_path):
    _, store = to_store(tmp_path, "mtp")
    next(
        p for p in (store.folder / "arrays" / "params.moe.mlp.experts.down_proj").rglob("*") if p.is_file() and p.name != "zarr.json"
    ).unlink()
    with pytest.raises(CheckpointError, match=r"params/moe/mlp/experts/down_proj in .*: cannot be read"):
        load_params(Store(store.folder), "float32", ONE)


def test_parameters_in_memory_export_to_the_public_layout(tmp_path):
    arrays = golden("mtp")
    public = open_public(public_folder(tmp_path / "public", "mtp"))
    params, bias = load_params(public, "float32", ONE)
    export(ArraySource(public.config, params, bias), tmp_path / "out", "bfloat16", {}, tmp_path)
    again = open_public(tmp_path / "out")
    assert again.config == public.config
    # The goldens hold values that bfloat16 can represent.
    jax.tree.map(np.testing.assert_array_equal, load_params(again, "float32", ONE), (params, bias))
    assert_close(main_logits(again, arrays["input_ids"]), arrays["logits"])


def test_a_model_that_public_readers_would_route_otherwise_is_not_exported(tmp_path):
    arrays = golden("compressed_grouped")
    config = json.loads(str(arrays["config"]))
    public = open_public(public_folder(tmp_path / "public", "compressed_grouped"))
    changed = public.config.__class__(**{**public.config.__dict__, "group_top_k": 1})
    assert config["n_group"] > config["topk_group"]
    with pytest.raises(ConfigError, match=r"model\.group_top_k = 1: public readers"):
        export(ArraySource(changed, *load_params(public, "float32", ONE)), tmp_path / "out", "source", {}, tmp_path)
    assert not (tmp_path / "out.partial").exists()


NAME = "model.layers.1.mlp.experts.2.up_proj.weight"
SCALE = f"{NAME}_scale_inv"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_changed(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def poisoned(scale):
    scale = scale.copy()
    scale[-1, -1] = np.nan
    return scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NAME), f"{NAME}: is missing from the checkpoint; config.json asks for it with shape (136, 160)"),
        (without(SCALE), f"{SCALE} in model-"),
        (with_changed(NAME, lambda w: w[:-1]), "has shape (135, 160), config.json asks for (136, 160)"),
        (with_changed(NAME, lambda w: w.astype(np.float32)), "tensors of one kind share a dtype"),
        (with_changed(NAME, lambda w: w.astype(np.int32)), "has dtype int32; float32, bfloat16, float16 and FP8 E4M3 are read"),
        (with_changed(SCALE, lambda s: s[:, :1]), "is float32 (2, 1); must be float32 (2, 2), one scale per 128x128 block"),
        (with_changed(SCALE, lambda s: s.astype(np.float16)), "is float16 (2, 2); must be float32"),
        (with_changed(SCALE, poisoned), "holds a scale that is NaN or infinite"),
        (lambda t: t | {"model.layers.0.mlp.bias": np.zeros(3, np.float32)}, "model.layers.0.mlp.bias"),
        (lambda t: t | {"model.norm.weight_scale_inv": np.ones((2, 1), np.float32)}, "needs no scales"),
    ],
)
def test_a_broken_tensor_is_named_with_its_file_and_nothing_is_written(tmp_path, change, message):
    arrays = golden("fp8")
    folder = write_public(tmp_path / "public", json.loads(str(arrays["config"])), change(tensors_of(arrays)))
    with pytest.raises(CheckpointError, match=re.escape(message).replace("in\\ model\\-", "in .*model-")) as error:
        convert(open_public(folder), folder, tmp_path / "store", "source")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["public"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json in .*: cannot be read"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_config_json_is_named(tmp_path, text, message):
    folder = public_folder(tmp_path / "public", "mtp")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_public(folder)


def test_a_saved_model_without_its_mtp_layer_opens_without(tmp_path, caplog):
    arrays = golden("mtp")
    config = json.loads(str(arrays["config"]))
    layer = f"model.layers.{config['num_hidden_layers']}."
    tensors = {name: value for name, value in tensors_of(arrays).items() if not name.startswith(layer)}
    public = open_public(write_public(tmp_path / "public", config, tensors))
    assert public.config.num_nextn_predict_layers == 0
    assert "holds no MTP layer" in caplog.text
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers = 0: .*holds layers beyond"):
        open_public(write_public(tmp_path / "other", config | {"num_nextn_predict_layers": 0}, tensors_of(arrays)))
