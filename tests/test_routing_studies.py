"""What the studies of routing count: loads of picked experts, mutual information with domains, and text by domain."""

from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from experiments.ablations.domains import PIECE, domain_of, text_source, write_domains
from experiments.ablations.routing import check_routed, loads_of, mutual_information


def test_a_model_that_routes_nothing_is_refused():
    check_routed(ModelConfig(num_hidden_layers=3, first_k_dense_replace=2))
    with pytest.raises(ConfigError, match=r"config\.model\.first_k_dense_replace = 3: leaves no MoE layer"):
        check_routed(ModelConfig(num_hidden_layers=3, first_k_dense_replace=3))


def test_loads_count_the_picks_of_each_row_and_layer():
    picks = np.random.default_rng(0).integers(0, 5, (2, 3, 7, 2))
    loads = loads_of(picks, 5)
    expected = [[[(row == expert).sum() for expert in range(5)] for row in layer] for layer in picks]
    assert np.array_equal(loads, expected)


@pytest.mark.parametrize(
    ("load", "bits"),
    [
        ([[0.25, 0.25, 0.25, 0.25]] * 2, 0.0),
        ([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], 1.0),
        ([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], 0.5 * np.log2(4 / 3) + 0.25 * np.log2(2 / 3) + 0.25 * np.log2(2)),
    ],
)
def test_mutual_information_of_domain_and_expert(load, bits):
    layers = np.array(load)[:, None].repeat(3, 1)
    assert mutual_information(layers) == pytest.approx([bits] * 3)


@pytest.mark.parametrize(
    ("name", "domain"),
    [("a.py", "code"), ("a.rst", "prose"), ("LICENSE", "prose"), ("README.txt", "prose"), ("a.svg", "markup"), ("a.csv", "data"),
     ("a.txt", None), ("LICENSE.so", None)],
)  # fmt: skip
def test_the_domain_of_a_file_is_in_its_name(name, domain, tmp_path):
    assert domain_of(tmp_path / name) == domain


def test_the_source_is_the_same_for_every_spelling_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spelt = (tmp_path / "run" / "text", Path("run/text"), Path("../", tmp_path.name, "run/text"))
    assert {text_source(folder) for folder in spelt} == {f"text:{tmp_path.resolve()}/run/text/*/*.txt"}


def test_text_is_cut_once_and_no_more_than_is_asked_for(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in [
        ("long.py", "é" * PIECE + "è" * PIECE + "ê" * PIECE),
        ("same.md", "one text"),
        ("twin.md", "one text"),
        ("page.html", "<p>"),
        ("broken.json", b"\xff"),
        ("table.csv", "1,2"),
    ]:
        (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    sizes = write_domains(tmp_path / "text", [source], 2 * PIECE + 1)
    assert sizes == {"code": 4 * PIECE, "prose": 8, "markup": 3, "data": 3}  # two bytes a character: a second piece is begun, no third
    (source / "page.html").unlink()
    assert write_domains(tmp_path / "text", [source], 1) == sizes  # kept
    with pytest.raises(ConfigError, match=r"--folders = None: no markup was found; .* \.html"):
        write_domains(tmp_path / "other", [source], PIECE)
    with pytest.raises(ConfigError, match=r"--folders = '.*missing': is no folder"):
        write_domains(tmp_path / "other", [source, tmp_path / "missing"], PIECE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text"]
