"""Seeds of a study: each its own weights and order of text, all of them one program."""

import logging

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_jax.config import ConfigError, from_config_dict
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


def test_a_seed_changes_the_order_of_the_text_and_the_weights(config):
    other = study.with_seed(config, 2)
    assert (other.train.seed, other.data.seed) == (config.train.seed + 2, config.data.seed + 2)
    assert study.with_seed(config, 0) == config


@pytest.mark.parametrize(("total", "times", "expected"), [(60, 3, [20, 40, 60]), (2, 5, [1, 2]), (7, 1, [7])])
def test_a_run_is_watched_evenly_and_at_its_end(total, times, expected):
    assert study.Watch(WATCH.measure, times).steps(total) == expected


def test_cells_and_bands_show_the_deviation_over_seeds():
    assert study.mean_std([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert study.mean_std([1.5], 1) == "1.5"
    assert study.difference(np.array([1.0, 2.0]), np.array([2.0, 1.0])) == "0.0000 ± 1.4142 (lower in 1 of 2 seeds)"
    ax = Figure().subplots()
    study.band(ax, [0, 1], np.array([[1.0, 1.0], [3.0, 1.0]]), "name")
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(edges.min(), 2 - 2**0.5) and np.isclose(edges.max(), 2 + 2**0.5)
    assert ax.lines[0].get_ydata().tolist() == [2.0, 1.0]
