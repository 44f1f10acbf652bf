"""Seeds of a study: each its own weights and order of text, all of them one program."""

import collections
import json
import logging

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_jax.config import ConfigError, from_config_dict, to_dict
from dsv3_jax.training.metrics import write_json
from experiments.ablations import study
from tests import micro_config


@pytest.fixture(scope="module")
def config():
    edited = micro_config.get_config()
    edited.model.update(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, n_shared_experts=0)
    edited.train.update(steps=2, batch_size=2)
    edited.data.held_out = 0.2
    return from_config_dict(edited)


@pytest.fixture
def compiled(caplog):
    """Returns the names of the programs that were compiled since it was asked last."""

    def names():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [message.split()[1] for message in messages if message.startswith("Compiling ")]

    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        yield names


WATCH = study.Watch(lambda config, state, text: {"bias": state.router_bias.moe}, times=2)


def test_seeds_differ_in_weights_and_text_and_share_one_program(config, tmp_path, compiled):
    variants = {"one": config}
    study.train_seeds(variants, 1, tmp_path, WATCH)
    assert compiled().count("jit(step)") == 1
    curves = study.train_seeds(variants, 2, tmp_path, WATCH)["one"]
    assert compiled() == []
    assert len(curves) == 2 and not np.allclose(curves[0].loss, curves[1].loss, atol=1e-3)
    assert curves[0].measured["bias"].shape == (2, 1, config.model.n_routed_experts)
    assert not np.array_equal(curves[0].measured["bias"][0], curves[0].measured["bias"][1])
    again = study.train_seeds(variants, 2, tmp_path, WATCH)["one"]
    assert np.array_equal(again[1].loss, curves[1].loss) and np.array_equal(again[1].measured["step"], [1, 2])
    with pytest.raises(ConfigError, match=r"one-seed0\.json is of another configuration"):
        study.train_seeds({"one": study.changed(config, optimizer={"peak_lr": 1.0})}, 1, tmp_path)
    with pytest.raises(ConfigError, match=r"one-seed0\.json was measured with {'times': 2}, not {'times': 2, 'n': 1}"):
        study.train_seeds(variants, 1, tmp_path, WATCH._replace(settings={"n": 1}))


def test_what_is_kept_is_read_once(config, tmp_path, monkeypatch):
    write_json(tmp_path / "one.json", {"config": to_dict(config), "watch": None, "loss": [2.0], "val_loss": 3.0, "measured": {}})
    read, loads = collections.Counter(), json.loads
    monkeypatch.setattr(json, "loads", lambda text: [read.update([text]), loads(text)][1])
    curve = study.train_variants({"one": config}, tmp_path, text=study.Text(None, None, None))["one"]
    assert (curve.loss.tolist(), curve.val_loss) == ([2.0], 3.0)
    assert list(read.values()) == [1]


@pytest.mark.parametrize(
    ("sections", "field", "value", "was"),
    [
        ({"data": {"source": "stdlib"}}, "config.data.source", "'stdlib'", "'text:"),
        ({"data": {"held_out": 0.3}}, "config.data.held_out", "0.3", "0.2"),
        ({"model": {"vocab_size": 301}}, "config.model.vocab_size", "301", "300"),
    ],
)
def test_a_tokenizer_is_not_taken_for_what_other_settings_would_make(config, tmp_path, sections, field, value, was):
    study.open_text(config, tmp_path)
    study.open_text(study.with_seed(config, 1), tmp_path)  # what does not make it may change
    with pytest.raises(ConfigError) as error:
        study.open_text(study.changed(config, **sections), tmp_path)
    assert str(error.value).startswith(f"{field} = {value}: {tmp_path / 'tokenizer.json'} was made from {was}")
    assert str(error.value).endswith("give that value or a new --workdir")


def test_what_does_not_say_what_it_was_made_from_is_refused(tmp_path):
    study.check_made_from(tmp_path / "text", {"--n": 1})
    study.check_made_from(tmp_path / "text", {"--n": 2})  # it was not made yet
    (tmp_path / "text").mkdir()
    study.check_made_from(tmp_path / "text", {"--n": 2})
    (tmp_path / "text.made_from.json").unlink()
    with pytest.raises(ConfigError, match=r"--workdir = '.*': text does not say what it was made from; give a new --workdir"):
        study.check_made_from(tmp_path / "text", {"--n": 2})


def test_the_largest_seed_trains(config, tmp_path):
    last = study.changed(config, train={"seed": 2**32 - 1})
    _, losses, _ = study.train(last, study.open_text(config, tmp_path), "last")
    assert np.isfinite(losses).all()
    with pytest.raises(ConfigError, match=r"config\.train\.seed = 4294967296: must lie in 0\.\.4294967295"):
        study.with_seed(last, 1)


def test_a_seed_changes_the_order_of_the_text_and_the_weights(config):
    other = study.with_seed(config, 2)
    assert (other.train.seed, other.data.seed) == (config.train.seed + 2, config.data.seed + 2)
    assert study.with_seed(config, 0) == config


@pytest.mark.parametrize(("total", "times", "expected"), [(60, 3, [20, 40, 60]), (2, 5, [1, 2]), (7, 1, [7])])
def test_a_run_is_watched_evenly_and_at_its_end(total, times, expected):
    assert study.Watch(WATCH.measure, times).steps(total) == expected


def test_the_deviation_over_one_seed_is_0():
    assert study.deviation([1.0, 2.0, 3.0]) == 1 and study.deviation([1.5]) == 0
    assert study.deviation(np.array([[1.0, 3.0], [2.0, 2.0]]), axis=1).tolist() == [2**0.5, 0]


def test_cells_and_bands_show_the_deviation_over_seeds():
    assert study.mean_std([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert study.mean_std([1.5], 1) == "1.5"
    assert study.difference(np.array([1.0, 2.0]), np.array([2.0, 1.0])) == "0.0000 ± 1.4142 (lower in 1 of 2 seeds)"
    ax = Figure().subplots()
    study.band(ax, [0, 1], np.array([[1.0, 1.0], [3.0, 1.0]]), "name")
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(edges.min(), 2 - 2**0.5) and np.isclose(edges.max(), 2 + 2**0.5)
    assert ax.lines[0].get_ydata().tolist() == [2.0, 1.0]
