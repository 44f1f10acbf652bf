"""A configuration is taken as it was meant or refused with the field, its value and what to do instead."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from dsv3_jax.config import Config, ConfigError, check_override, default_config, describe_fields, from_config_dict, from_dict, to_dict
from dsv3_jax.parallel.schedules import GENERATORS


def leaves(cls: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type hint) of every field that is no section."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


FIELDS = dict(leaves())
FLOATS = [name for name, hint in FIELDS.items() if hint in (float, float | None)]
OPTIONAL = [name for name, hint in FIELDS.items() if type(None) in typing.get_args(hint)]
OF_ANOTHER_TYPE = {int: 1.0, float: "1", str: 3, bool: 1}


def changed(**fields: Any) -> dict[str, Any]:
    """The defaults as plain dictionaries, with other values; `model__n_group=3` stands for model.n_group."""
    config = to_dict(Config())
    for path, value in fields.items():
        *sections, name = path.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[name] = value
    return config


def set_field(path: str, value: Any) -> dict[str, Any]:
    return changed(**{path.replace(".", "__"): value})


def refused(config: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_dict(config)
    assert "\n" not in str(caught.value)
    return caught.value


def test_round_trip_through_json():
    config = from_dict(changed(model__q_lora_rank=None, train__bias_update_tokens=5.0, model__rope_scaling__type="yarn", data__seed=3))
    assert (config.model.q_lora_rank, config.model.rope_scaling.type, config.data.seed) == (None, "yarn", 3)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_defaults_of_config_files_are_the_defaults():
    assert from_config_dict(default_config()) == Config()


def test_frozen_configuration_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "field", "meant"),
    [
        ("train.stepz", "config.train.stepz", "'steps'"),
        ("trian", "config.trian", "'train'"),
        ("model.rope_scaling.beta_quick", "config.model.rope_scaling.beta_quick", "beta_fast"),
    ],
)
def test_unknown_field_is_told_its_neighbours(path: str, field: str, meant: str):
    error = refused(set_field(path, 17))
    assert error.field == field
    assert "17" in str(error) and "unknown field" in str(error) and meant in str(error)


def test_unknown_field_of_a_config_file():
    config = default_config()
    config.train.stepz = 17
    with pytest.raises(ConfigError, match=r"config\.train\.stepz = 17: unknown field, did you mean 'steps'\?"):
        from_config_dict(config)


@pytest.mark.parametrize("path", FIELDS)
def test_no_field_takes_another_type(path: str):
    hint = FIELDS[path]
    expected = next(kind for kind in OF_ANOTHER_TYPE if kind is hint or kind in typing.get_args(hint))
    error = refused(set_field(path, OF_ANOTHER_TYPE[expected]))
    assert error.field == f"config.{path}"
    assert f"must be {expected.__name__}, not {type(OF_ANOTHER_TYPE[expected]).__name__}" in str(error)


@pytest.mark.parametrize("path", ["train.steps", "optimizer.peak_lr"])
def test_true_is_no_number(path: str):
    assert refused(set_field(path, True)).field == f"config.{path}"


def test_integer_is_taken_for_a_float():
    rate = from_dict(changed(optimizer__peak_lr=2)).optimizer.peak_lr
    assert rate == 2 and type(rate) is float


@pytest.mark.parametrize("path", FIELDS)
def test_none_is_for_optional_fields_only(path: str):
    config = set_field(path, None)
    if path in OPTIONAL:
        from_dict(config)
    else:
        assert refused(config).field == f"config.{path}"


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("path", FLOATS)
def test_no_field_takes_what_is_not_finite(path: str, value: float):
    error = refused(set_field(path, value))
    assert error.field == f"config.{path}"
    assert f" = {value}: " in str(error)


@pytest.mark.parametrize("value", [3, None, [1]], ids=str)
def test_section_must_be_a_section(value: Any):
    error = refused(set_field("train", value))
    assert error.field == "config.train"
    assert "sequence_length" in str(error)


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"model__scoring_func": "sigmod"}, "model.scoring_func", "did you mean 'sigmoid'? (one of sigmoid, softmax)"),
        ({"train__remat": "everything"}, "train.remat", "one of none, selective, full"),
        ({"train__steps": 0}, "train.steps", "must be above 0"),
        ({"data__seed": -1}, "data.seed", "must lie in 0..4294967295"),
        ({"data__seed": 2**32}, "data.seed", "must lie in 0..4294967295"),
        ({"train__seed": 2**32}, "train.seed", "must lie in 0..4294967295"),
        ({"data__held_out": 0.0}, "data.held_out", "must be above 0"),
        ({"data__held_out": 1.0}, "data.held_out", "must lie in [0, 1)"),
        ({"train__ema_decay": -0.5}, "train.ema_decay", "must lie in [0, 1)"),
        ({"model__q_lora_rank": 0}, "model.q_lora_rank", "or None for no compression"),
        ({"model__qk_rope_head_dim": 63}, "model.qk_rope_head_dim", "must be even"),
        ({"model__n_routed_experts": 0}, "model.n_routed_experts", "set model.first_k_dense_replace to model.num_hidden_layers"),
        ({"model__n_routed_experts": 250}, "model.n_routed_experts", "must be a multiple of model.n_group = 8"),
        ({"model__topk_group": 9}, "model.topk_group", "must be at most model.n_group = 8"),
        ({"model__num_experts_per_tok": 129}, "model.num_experts_per_tok", "must lie in 1..128: the experts of model.topk_group = 4"),
        ({"model__num_experts_per_tok": 0}, "model.num_experts_per_tok", "must lie in 1..128"),
        ({"train__sequence_length": 4097}, "train.sequence_length", "must be at most model.max_position_embeddings = 4096"),
        ({"train__sequence_length": 1}, "train.sequence_length", "must be above the MTP depth model.num_nextn_predict_layers = 1"),
        ({"train__batch_size": 12}, "train.batch_size", "must be a multiple of train.micro_batch_size = 8"),
        (
            {"train__batch_size": 16, "train__batch_size_start": 12},
            "train.batch_size_start",
            "must be a multiple of train.micro_batch_size",
        ),
        ({"train__batch_size_start": 16}, "train.batch_size_start", "must be at most train.batch_size = 8"),
        ({"data__num_shards": 3}, "data.num_shards", "must divide train.micro_batch_size = 8"),
        (
            {"parallel__mesh__data": 16, "train__micro_batch_size": 8},
            "train.micro_batch_size",
            "must be a multiple of parallel.mesh.data 16 x node 1 x gpu 1 = 16",
        ),
        (
            {
                "parallel__mesh__gpu": 3,
                "train__micro_batch_size": 24,
                "train__batch_size": 24,
                "train__batch_size_start": 24,
                "model__n_routed_experts": 256,
            },
            "model.n_routed_experts",
            "must be a multiple of parallel.mesh.node 1 x gpu 3 = 3",
        ),
        ({"parallel__dispatch_bound": 0.5}, "parallel.dispatch_bound", "must be at least 1"),
        (
            {"train__micro_batch_size": 8, "parallel__overlap": True, "parallel__mesh__data": 8},
            "train.micro_batch_size",
            "must be a multiple of 2 x parallel.mesh.data 8",
        ),
        ({"parallel__overlap": True, "train__balance": "batch_wise"}, "parallel.overlap", "must be False with train.balance batch_wise"),
        ({"parallel__shard": "parameters", "train__remat": "none"}, "parallel.shard", "needs train.remat selective or full"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_and_relations(fields: dict[str, Any], field: str, remedy: str):
    error = refused(changed(**fields))
    assert error.field == f"config.{field}"
    assert str(error).startswith(f"config.{field} = {fields[field.replace('.', '__')]!r}: ")
    assert remedy in str(error)


PIPELINE = {"parallel__mesh__pipe": 4, "train__batch_size": 64}  # eight micro-batches


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel__mesh__pipe": 3}, "config.parallel.mesh.pipe = 3: the number of pipeline ranks must be even and at least 2"),
        ({"train__batch_size": 72}, "config.train.batch_size / train.micro_batch_size = 9: the number of micro-batches must be even and"),
        ({"train__batch_size": 48}, "config.train.batch_size / train.micro_batch_size = 6: .* at least 2 P = 8"),
        ({"model__num_hidden_layers": 3}, "config.model.num_hidden_layers = 3: the pipeline has 4 stages; use fewer ranks or more layers"),
        ({"model__num_hidden_layers": 7, "parallel__schedule": "dualpipe_v"}, "config.model.num_hidden_layers = 7: the pipeline has 8"),
        ({"parallel__schedule": "dualpip"}, "config.parallel.schedule = 'dualpip': did you mean 'dualpipe'"),
        ({"parallel__shard": "gradients"}, "config.parallel.shard = 'gradients': must be optimizer where parallel.mesh.pipe = 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_pipelines_that_cannot_run(fields: dict[str, Any], message: str):
    assert re.match(message, str(refused(changed(**PIPELINE | fields))))


def test_the_schedules_of_the_configuration_are_those_there_are():
    for name in GENERATORS:
        assert from_dict(changed(**PIPELINE, parallel__schedule=name)).parallel.schedule == name


@pytest.mark.parametrize(
    "fields",
    [
        PIPELINE,
        {"model__num_experts_per_tok": 128},
        {"model__topk_group": 8, "model__num_experts_per_tok": 256},
        {"train__sequence_length": 2},
        {"train__batch_size": 24, "train__batch_size_start": 16},
        {"model__first_k_dense_replace": 61, "model__num_nextn_predict_layers": 0, "model__n_routed_experts": 0},
        {"data__fim_rate": 0.0, "train__ema_decay": 0.0},
    ],
    ids="-".join,
)
def test_limits_themselves_are_allowed(fields: dict[str, Any]):
    from_dict(changed(**fields))


@pytest.mark.parametrize(
    ("path", "text", "field", "remedy"),
    [
        ("train.stepz", "3", "train.stepz", "unknown field, did you mean 'steps'?"),
        ("trian.steps", "3", "trian", "unknown field, did you mean 'train'?"),
        ("train.steps.more", "3", "train.steps.more", "config.train.steps has no fields"),
        ("model.rope_scaling.tipe", "yarn", "model.rope_scaling.tipe", "did you mean 'type'?"),
        ("train", "3", "train", "is a section; set one of its fields: steps, seed"),
        ("train.steps", "many", "train.steps", "must be int"),
        ("train.steps", "2.5", "train.steps", "must be int"),
        ("optimizer.peak_lr", "fast", "optimizer.peak_lr", "must be float"),
        ("model.q_lora_rank", "1.5", "model.q_lora_rank", "must be int"),
        ("data.document_mask", "maybe", "data.document_mask", "must be true or false"),
    ],
)
def test_override_is_refused(path: str, text: str, field: str, remedy: str):
    with pytest.raises(ConfigError) as caught:
        check_override(path, text)
    assert str(caught.value).startswith(f"config.{field} = {text!r}: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("train.steps", "3"),
        ("optimizer.peak_lr", "1e-3"),
        ("optimizer.peak_lr", "1"),
        ("train.mtp_switch_tokens", "1e9"),
        ("model.rope_scaling.type", "yarn"),
        ("data.document_mask", "True"),
        ("data.source", "text:*.md"),
    ],
)
def test_override_is_taken(path: str, text: str):
    check_override(path, text)


def test_help_lists_every_field_once_with_type_and_default():
    lines = describe_fields().splitlines()
    assert [line.strip().split(":")[0] for line in lines] == list(FIELDS)
    assert "  optimizer.peak_lr: float = 0.00022" in lines
