"""Every notebook runs from its own folder, at a reduced size, and shows what it says it shows."""

import ast
import functools
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SMALL = {
    "model.vocab_size": 300, "model.hidden_size": 32, "model.intermediate_size": 48, "model.moe_intermediate_size": 16,
    "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.q_lora_rank": 16, "model.kv_lora_rank": 8,
    "model.qk_nope_head_dim": 8, "model.qk_rope_head_dim": 4, "model.v_head_dim": 8, "model.n_routed_experts": 8,
    "model.max_position_embeddings": 64, "data.source": "text:dsv3_jax/**/*.py",
    "train.sequence_length": 16, "train.eval_every": 3, "train.eval_sequences": 8, "checkpoint.every": 3,
}  # fmt: skip
BATCH_SIZES = ("train.batch_size", "train.batch_size_start")
FEW = SMALL | {  # documents and parts, to be tokenized and compiled soon
    "data.source": "text:dsv3_jax/model/*.py", "data.held_out": 0.2, "data.num_shards": 2, "train.micro_batch_size": 2,
    **dict.fromkeys(BATCH_SIZES, 2), "model.num_nextn_predict_layers": 0, "model.n_shared_experts": 0,
    "model.q_lora_rank": None,
}  # fmt: skip
ONE_LAYER = FEW | {"model.num_hidden_layers": 1, "model.first_k_dense_replace": 0}
# What the cell tagged `parameters` is replaced with.
PARAMETERS = {
    "quickstart": {"STEPS": 6, "OVERRIDES": SMALL},
    "mla_walkthrough": {"STEPS": 2, "OVERRIDES": FEW},
    "moe_routing": {"TOKENS": 512, "UPDATES": 100},
    "fp8_recipe": {"STEPS": 2, "LONGEST": 512, "OVERRIDES": ONE_LAYER},
    "dualpipe": {"P": 2, "M": 4, "OVERRIDES": ONE_LAYER | {"model.num_hidden_layers": 2} | dict.fromkeys(BATCH_SIZES, 8)},
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Runs a notebook once: returns it with its outputs, and the workdir that it filled."""

    @functools.cache
    def execute(name):
        workdir = tmp_path_factory.mktemp(name) / "run"
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        (parameters,) = tagged(notebook, "parameters")
        values = PARAMETERS[name] | {"WORKDIR": str(workdir)}
        parameters.source = "\n".join(f"{variable} = {value!r}" for variable, value in values.items())
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
        return notebook, workdir

    return execute


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def shown(notebook, tag):
    """What the cells with that tag, or the one of that name, print."""
    cells = [cell for cell in notebook.cells if cell.id == tag] or tagged(notebook, tag)
    return "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def numbers(notebook, cell):
    """The numbers that a cell prints, in order."""
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", shown(notebook, cell))]


def images(notebook):
    outputs = [output for cell in tagged(notebook, "figures") for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def code(path):
    """The code cells as a syntax tree, without the lines that only IPython reads."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return ast.parse("\n".join(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in cells))


def test_each_is_executed_by_a_test():
    assert {path.stem for path in NOTEBOOKS} == set(PARAMETERS)


@each
def test_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@each
def test_installs_as_the_others_do(path):
    first, other = (nbformat.read(one, as_version=4).cells for one in (path, NOTEBOOKS[0]))
    assert [cell.source for cell in first if cell.id == "install"] == [cell.source for cell in other if cell.id == "install"] != []


@functools.cache
def public_names():
    """Functions and classes at the top level of the library's modules."""
    files = [file for package in ("dsv3_jax", "pallas_kernels", "experiments") for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")}


def defined(tree):
    """Names that code defines as functions or classes, lambdas included."""
    named = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    lambdas = [node.targets for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]
    return named | {target.id for targets in lambdas for target in targets if isinstance(target, ast.Name)}


@each
def test_redefines_nothing_of_the_library(path):
    assert not defined(code(path)) & public_names()


@each
def test_every_import_is_used(path):
    """Ruff leaves notebooks alone."""
    tree = code(path)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    assert imported <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def assert_drawn(notebook, count):
    assert len(images(notebook)) == count
    assert min(map(len, images(notebook))) > 5000  # an empty figure is smaller


def test_quickstart_shows_every_figure_of_the_report(executed):
    notebook, workdir = executed("quickstart")
    count = len(list((workdir / "report").glob("*.png")))
    assert count >= 6
    assert_drawn(notebook, count)


def test_quickstart_generates_text(executed):
    notebook, _ = executed("quickstart")
    text = shown(notebook, "generated")
    prompt = "def read(self, "
    assert text.startswith(prompt)
    assert len(text.strip()) > len(prompt)


def test_quickstart_evaluates_what_the_run_had_reached(executed):
    notebook, workdir = executed("quickstart")
    summary = json.loads((workdir / "summary.json").read_text())
    losses = [line.split("loss ")[1].split(" ")[0] for line in shown(notebook, "evaluated").splitlines()]
    assert [float(loss) for loss in losses] == pytest.approx([summary["val_loss"], summary["ema_val_loss"]], abs=1e-3)
    assert summary["steps"] == 6


def test_mla_walkthrough(executed):
    notebook, _ = executed("mla_walkthrough")
    assert_drawn(notebook, 6)
    assert numbers(notebook, "expand") == [8 + 4, 2 * (8 + 8)]
    assert numbers(notebook, "rope")[-1] < 1e-5
    largest, difference = numbers(notebook, "absorb")
    assert difference < 1e-5 * max(largest, 1)
    _, difference, largest = numbers(notebook, "decode")
    assert difference < 1e-5 * max(largest, 1)
    assert numbers(notebook, "cache") == [1, 56.9, 2.25]  # the paper's 2.25 groups
    assert numbers(notebook, "pattern")[-1] < 1e-5


def test_moe_routing(executed):
    notebook, _ = executed("moe_routing")
    assert_drawn(notebook, 7)
    free, limited = numbers(notebook, "affinity")
    assert limited <= 4 < free
    assert numbers(notebook, "gate")[-1] == 2.5
    expert, without, biased, _, difference, kept, _ = numbers(notebook, "bias")
    assert 0 < kept <= biased < without and difference == 0, expert
    trained = [line.split("MaxVio ")[1].split() for line in shown(notebook, "train").splitlines()]
    assert len(trained) == 3 and all(float(words[5]) < float(words[0]) / 2 for words in trained)
    _, direct, _, _, two_hop, _ = numbers(notebook, "traffic")
    assert two_hop < 0.6 * direct
    assert numbers(notebook, "plan") == [24, 24, 16, 40]
    assert [line.split()[-1] for line in shown(notebook, "combine").splitlines()] == ["0.0e+00", "0.0e+00"]
    assert all(placed < 1.3 < once for _, once, placed, _ in zip(*[iter(numbers(notebook, "placement"))] * 4, strict=True))


@pytest.mark.slow
def test_fp8_recipe(executed):
    notebook, _ = executed("fp8_recipe")
    assert_drawn(notebook, 8)
    assert [line.split()[1] for line in shown(notebook, "formats").splitlines()] == ["65", "65", "1025"]
    lost = [float(line.split(", ")[1].split("%")[0]) for line in shown(notebook, "scales").splitlines()]
    assert lost[0] < 0.1 < lost[1] < lost[2]
    changed = [float(line.split("%")[0].split()[-1]) for line in shown(notebook, "power").splitlines()]
    assert changed[1] < 10 < 50 < changed[0]
    errors = [float(error) for error in re.findall(r"([\d.]+)%", shown(notebook, "gemms"))]
    assert len(errors) == 9 and all(0.1 < error < 10 for error in errors)
    promoted, _, never = (float(line.split("error ")[1].split()[0]) for line in shown(notebook, "sums").splitlines())
    assert promoted < never
    bf16, fp8 = (float(line.split("differ, ")[1].split()[0]) for line in shown(notebook, "kept").splitlines())
    assert fp8 < bf16
    assert 0 < numbers(notebook, "curves")[1] < 2


@pytest.mark.slow
def test_dualpipe(executed):
    notebook, _ = executed("dualpipe")
    assert_drawn(notebook, 8)
    bubbles = {line.split()[0]: float(line.split()[2]) for line in shown(notebook, "costs").splitlines()[2:7]}
    formulas = [float(text.split(",")[0]) for text in shown(notebook, "costs").splitlines()[-1].split(" = ")[1:]]
    assert [bubbles[name] for name in ("1f1b", "zb1p", "dualpipe")] == formulas
    slow, fast, _ = numbers(notebook, "overlap")
    assert fast < slow
    plain_loss, piped_loss, plain_norm, piped_norm, loads, bias = numbers(notebook, "same")
    assert (piped_loss, piped_norm) == pytest.approx((plain_loss, plain_norm), abs=2e-6)
    assert loads == bias == 0
