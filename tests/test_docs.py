"""Links of the documentation lead somewhere, and the index leads to every part."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/golden/README.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page):
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page):
    """Targets of links and pictures that are files here: path, and anchor or ""."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in (target.partition("#") for target in inside)]


def anchors(page):
    """What a heading is linked by: its words in lower case, joined by hyphens."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page):
    for path, anchor in links(page):
        assert path.exists(), f"{page.name}: no {path}"
        assert not anchor or anchor in anchors(path), f"{page.name}: no heading #{anchor} in {path.name}"


@each_page
def test_every_test_that_is_named_is_there(page):
    """Pages name tests as `tests/x.py`, and some as `test_x.py::test_of_it`."""
    text = prose(page)
    for path in re.findall(r"`(tests/[\w/.]+)", text):
        assert (ROOT / path).exists(), path
    for file, name in re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)::(\w+)", text):
        places = [path for path in (ROOT / "tests").rglob(Path(file).name) if path.as_posix().endswith(f"/{file}")]
        assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in places), f"{file}::{name}"


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_file_that_a_notebook_names_is_there(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for path in re.findall(r"`((?:docs|dsv3_jax|configs|tests|experiments)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(\w+\.ipynb)`", text):
        assert (notebook.parent / name).exists(), name
    for command in re.findall(r"-m (experiments[\w.]+\w)", text):
        assert (ROOT / command.replace(".", "/")).with_suffix(".py").exists(), command


def test_the_index_leads_to_every_page_notebook_and_module():
    linked = {path for path, _ in links(ROOT / "docs/index.md")}
    modules = [path for path in (ROOT / "dsv3_jax").rglob("*.py") if path.name != "__init__.py"]
    parts = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb"), *modules]
    missing = {path.relative_to(ROOT).as_posix() for path in parts} - {"docs/index.md"}
    missing -= {path.relative_to(ROOT).as_posix() for path in linked if path.is_relative_to(ROOT)}
    assert not missing


def test_the_index_names_every_command():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    files = [path for path in (ROOT / "experiments").rglob("*.py") if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert len(files) > 10
    for path in files:
        assert re.search(rf"\bexperiments\.([\w.]+\.)?{path.stem}\b|`{path.stem}`", text), path.relative_to(ROOT)


def test_every_claim_in_the_readme_is_linked():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| claim | shown by |\n| --- | --- |\n")[1].split("\n\n")[0]
    assert all("](" in row.split("|")[2] for row in table.splitlines())
