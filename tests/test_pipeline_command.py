import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.test_cli import assert_refused, run


def test_the_command_draws_prints_and_writes_what_it_says(tmp_path: Path):
    done = run("pipeline", "--P=4", "--M=10", "--FB=2.5", f"--figure={tmp_path}/gantt", f"--json={tmp_path}/ops.json")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gantt.png", "gantt.svg", "ops.json"]
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert rows["1f1b"] == ["39", "9", "23.1%", "1", "4"]
    assert rows["dualpipe"] == ["29", "1.5", "5.2%", "2", "5"]  # (P / 2 - 1) (FB + B - 3 W) = 1.5
    written = json.loads((tmp_path / "ops.json").read_text())
    assert written["ranks"][0][:5] == ["F0.0", "F0.1", "F0.2", "F1.0", "I1.0"]
    assert "FB(F1.2,B0.0)" in written["ranks"][0]
    text = "".join(ET.parse(tmp_path / "gantt.svg").getroot().itertext())
    assert "DualPipe: 4 ranks, 10 micro-batches" in text
    assert (tmp_path / "gantt.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--P=3"], ["P = 3", "even"]),
        (["--M=12"], ["M = 12", "at least 2 P = 16"]),
        (["--schedule=dualpip"], ["schedule = 'dualpip'", "did you mean 'dualpipe'"]),
        (["--W=5"], ["W = 5.0", "above B = 2.0"]),
        (["--F=-1"], ["F = -1.0", "negative"]),
        (["--json=nowhere/ops.json"], ["--json = 'nowhere/ops.json'", "there is no folder nowhere"]),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path: Path, arguments: list[str], parts: list[str]):
    assert_refused(run("pipeline", f"--figure={tmp_path}/gantt", *arguments), *parts)
    assert not list(tmp_path.iterdir())
