"""The report of finished, young and unusual runs: complete, self-contained, safe against what a model may write."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.config import Config, ConfigError, to_dict
from dsv3_jax.training.metrics import MetricsWriter, write_json
from dsv3_jax.training.report import figures, si, write_report

SAMPLE = {
    "prompt": "def read(path):\n    ",
    "completion": "<script>alert('&')</script>\n    return None\n",
    "reference": 'with open(path) as file:\n        return file.read() if 1 < 2 else ""\n',
    "source": "pathlib.py",
}
SUMMARY = {
    "val_loss": 3.214,
    "val_bits_per_byte": 1.567,
    "mtp_accuracy": 0.213,
    "tokens_per_second": 5430.0,
    "peak_memory_bytes": 1.9 * 2**30,
    "parameters": 3_120_000,
    "seconds": 192.4,
    "compile_seconds": 31.0,
    "command": "uv run -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny",
}


def make_run(
    workdir: Path, steps: int, *, moe: int = 3, mtp: int = 1, eval_every: int = 80, experts: int = 16, finished: bool = False
) -> Path:
    """A run folder with plausible curves: power-law loss, warm-up and cosine, a batch ramp, experts that even out."""
    rng = np.random.default_rng(0)
    layers = [f"layer {i + 1}" for i in range(moe)] + [f"mtp {i + 1}" for i in range(mtp)] if moe else []
    skew = rng.normal(0, 0.8, (len(layers), experts))
    with MetricsWriter(workdir) as writer:
        for step in range(1, steps + 1):
            writer.write(metrics_row(step, steps, mtp, eval_every, rng) | ({} if layers else {"max_vio": float("nan")}))
            if layers and (step % 5 == 0 or step == 1):
                load = np.exp(skew * (0.15 + 0.85 * np.exp(-step / 40)) + rng.normal(0, 0.08, skew.shape))
                writer.write_load(step, load / load.sum(axis=1, keepdims=True), layers)
    config = to_dict(Config())
    config["model"]["vocab_size"], config["train"]["steps"] = 2048, steps
    write_json(workdir / "config.json", config)
    if finished:
        write_json(workdir / "summary.json", SUMMARY | {"steps": steps, "tokens": 2048 * steps})
        write_json(workdir / "samples.json", [SAMPLE] * 3)
    return workdir


def metrics_row(step: int, steps: int, mtp: int, eval_every: int, rng: np.random.Generator) -> dict[str, Any]:
    loss = 2.6 + 5.0 * (1 + step / 12) ** -0.6
    row = {
        "step": step, "tokens": 2048 * step, "loss": loss + rng.normal(0, 0.12), "balance_loss": 1e-4,
        "max_vio": 0.25 + 2.2 * np.exp(-step / 35) + rng.normal(0, 0.05),
        "learning_rate": 3e-3 * min(1.0, step / 16) * (1.0 if step < 176 else 0.55 + 0.45 * np.cos(np.pi * (step - 176) / 144)),
        "grad_norm": 0.4 + 2.5 * np.exp(-step / 20) + abs(rng.normal(0, 0.08)), "batch_size": min(8, 4 + step // 20),
        "tokens_per_second": (90.0 if step == 1 else 5400.0) * (1 + rng.normal(0, 0.03)), "skipped": 0,
    }  # fmt: skip
    if mtp:
        row["mtp_loss"] = loss + 0.7 + rng.normal(0, 0.12)
    if step % eval_every == 0:
        row |= {"val_loss": loss + 0.05, "val_bits_per_byte": (loss + 0.05) * 0.5, "val_mtp_accuracy": 0.25 * step / steps}
    return row


class Page(HTMLParser):
    """Tags, attributes and visible text of a report."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Page]:
    workdir = make_run(tmp_path_factory.mktemp("runs") / "tiny", 320, finished=True)
    return workdir, Page(write_report(workdir))


def test_finished_run_shows_every_part(finished_run):
    _, page = finished_run
    assert len(page.images()) == 6
    for expected in (
        "3.214",
        "1.567",
        "21.3",
        "5.43k",
        "1.90 GiB",
        "3.12M",
        "3 min 12 s",
        "and 31 s to compile",
        "step 320 of 320",
        "655k tokens",
    ):
        assert expected in page.text
    assert SUMMARY["command"] in page.text
    assert page.text.count("What really followed") == 3
    assert "bias_update_speed" in page.text and "rope_scaling.factor" in page.text  # nested sections of the configuration
    assert not any(attributes.get("class") == "notes" for _, attributes in page.tags)


def test_pngs_are_the_embedded_images(finished_run):
    workdir, page = finished_run
    files = {path.stem: path.read_bytes() for path in (workdir / "report").iterdir()}
    assert set(files) == {"loss", "validation", "expert_load", "max_vio", "schedule", "speed"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in files.values())
    embedded = {base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in page.images()}
    assert embedded == set(files.values())


def test_page_loads_nothing_and_runs_nothing(finished_run):
    _, page = finished_run
    assert "script" not in {tag for tag, _ in page.tags}
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
    assert references and all(str(value).startswith("data:image/png;base64,") for value in references)
    assert not re.search(r"https?://|url\(|@import", page.source)


def test_samples_are_escaped_and_read_back_exactly(finished_run):
    _, page = finished_run
    assert "<script>" not in page.source
    assert SAMPLE["prompt"] + SAMPLE["completion"] in page.text
    assert SAMPLE["prompt"] + SAMPLE["reference"] in page.text


def test_continued_run_names_what_is_not_there_yet(tmp_path):
    workdir = make_run(tmp_path / "young", 30)
    write_json(workdir / "summary.json", SUMMARY | {"steps": 20})  # of the 20 steps that it first had
    page = Page(write_report(workdir))
    assert "In progress" in page.text and "No evaluation yet" in page.text and "No samples yet" in page.text
    assert "3.214" not in page.text and "Peak memory" not in page.text
    assert not (workdir / "report/validation.png").exists()
    assert "--workdir=" in page.text


def test_one_step_of_a_dense_model_without_mtp(tmp_path):
    workdir = make_run(tmp_path, 1, moe=0, mtp=0)
    page = Page(write_report(workdir))
    assert set(figures(workdir)) == {"loss", "schedule", "speed"}
    assert "No MTP loss" in page.text and "No expert load" in page.text


def test_folder_of_a_run_before_its_first_step(tmp_path):
    page = Page(write_report(tmp_path))
    assert "No step is finished yet" in page.text and page.images() == []


def test_steps_that_are_not_finite_are_counted_and_leave_gaps(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 7):
            bad = step == 3
            row = metrics_row(step, 6, 1, 2, np.random.default_rng(step))
            writer.write(row | ({"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1} if bad else {}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a kill in the middle of a line
    page = Page(write_report(tmp_path))
    assert "1 skipped" in page.text and "step 6" in page.text
    (axes,) = figures(tmp_path)["loss"].axes
    raw = axes.lines[0].get_ydata()
    assert np.flatnonzero(np.isnan(raw)).tolist() == [2]


def test_heat_map_shows_load_relative_to_a_fair_share(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "tokens": 8, "loss": 1.0})
        for step in (1, 5, 20):
            writer.write_load(step, np.array([[0.5, 0.25, 0.25, 0.0]]), ["layer 1"])
    panel = figures(tmp_path)["expert_load"].axes[0]
    np.testing.assert_allclose(panel.images[0].get_array()[:, 0] if panel.images else panel.collections[0].get_array()[:, 0], [2, 1, 1, 0])


def test_deep_model_shows_evenly_spaced_layers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "tokens": 8, "loss": 1.0})
        writer.write_load(1, np.full((59, 8), 1 / 8), [f"layer {i}" for i in range(59)])
    figure = figures(tmp_path)["expert_load"]
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert (titles[0], titles[-1], len(titles)) == ("layer 0", "layer 58", 12)
    assert "12 of 59 layers" in figure.get_suptitle()


def test_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json.*is not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (999.7, "1k"), (655360, "655k"), (999_900, "1M"), (671.03e9, "671B")])
def test_counts_are_short(value, text):
    assert si(value) == text


def test_config_with_infinite_fields_is_strict_json(tmp_path):
    make_run(tmp_path, 1)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
