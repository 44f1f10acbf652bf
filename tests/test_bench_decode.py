import json
from pathlib import Path

import pytest

from tests.test_cli import TINY, assert_refused, run


def test_rates_follow_from_the_times(tmp_path: Path):
    sizes = ("--batch=2", "--context=16", "--new_tokens=3", "--repeats=1")
    done = run("bench.decode", "--config=tests/micro_config.py", *sizes, f"--json={tmp_path}/speed.json")
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "speed.json").read_text())["ours"]
    assert case["prefill_tokens_per_second"] == pytest.approx(2 * 16 / case["first_token_seconds"])
    assert case["decode_tokens_per_second"] == pytest.approx(2 / case["between_tokens_seconds"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [(["--batch=1,a"], ["--batch = '1,a'", "whole numbers"]), (["--context=500"], ["--context", "532 tokens", "takes 512"])],
)
def test_cases_that_cannot_run(arguments: list[str], parts: list[str]):
    assert_refused(run("bench.decode", TINY, *arguments), *parts)
