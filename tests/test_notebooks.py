"""Every notebook runs from its own folder, on a smaller model, and shows what it says it shows."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath("notebooks").glob("*.ipynb"))
SMALL = {
    "model.vocab_size": 300, "model.hidden_size": 32, "model.intermediate_size": 48, "model.moe_intermediate_size": 16,
    "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.q_lora_rank": 16, "model.kv_lora_rank": 8,
    "model.qk_nope_head_dim": 8, "model.qk_rope_head_dim": 4, "model.v_head_dim": 8, "model.n_routed_experts": 8,
    "model.max_position_embeddings": 64, "data.source": "text:dsv3_jax/**/*.py",
    "train.sequence_length": 16, "train.eval_every": 3, "train.eval_sequences": 8, "checkpoint.every": 3,
}  # fmt: skip


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    """The notebook with its outputs, after the cell tagged `parameters` was replaced, and the workdir it filled."""
    workdir = tmp_path_factory.mktemp("notebook") / "run"
    notebook = nbformat.read(request.param, as_version=4)
    (parameters,) = tagged(notebook, "parameters")
    parameters.source = f"STEPS = 6\nWORKDIR = {str(workdir)!r}\nOVERRIDES = {SMALL!r}"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": request.param.parent}}).execute()
    return notebook, workdir


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def printed(notebook, tag):
    (cell,) = tagged(notebook, tag)
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_shows_every_figure_of_the_report(executed):
    notebook, workdir = executed
    outputs = [output for cell in tagged(notebook, "figures") for output in cell.outputs]
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == len(list((workdir / "report").glob("*.png"))) >= 6
    assert min(map(len, images)) > 5000  # an empty figure is smaller


def test_generates_text(executed):
    notebook, _ = executed
    text = printed(notebook, "generated")
    prompt = "def read(self, "
    assert text.startswith(prompt)
    assert len(text.strip()) > len(prompt)


def test_evaluates_what_the_run_had_reached(executed):
    notebook, workdir = executed
    summary = json.loads((workdir / "summary.json").read_text())
    losses = [line.split("loss ")[1].split(" ")[0] for line in printed(notebook, "evaluated").splitlines()]
    assert [float(loss) for loss in losses] == pytest.approx([summary["val_loss"], summary["ema_val_loss"]], abs=1e-3)
    assert summary["steps"] == 6
