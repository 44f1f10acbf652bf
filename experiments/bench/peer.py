"""Peers to compare with: libraries, and other processes, of an interpreter that has them, which answer questions in lines of JSON."""

import contextlib
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config, to_dict

ROOT = Path(__file__).parents[2]  # a peer's script runs as a module: by its path, the files beside it would hide packages of their names


def has_tokamax() -> bool:
    """Whether its kernels can run, which jax-triton has to be there for."""
    return all(importlib.util.find_spec(name) for name in ("tokamax", "jax_triton"))


class Peer:
    """A script of this folder in an interpreter of its own. The first line that it prints says what it is."""

    def __init__(self, python: str, module: str, arguments: list[str]):
        """Raises RuntimeError where it does not start."""
        self._module = module
        command = [python, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.introduction = self._line()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises RuntimeError where it ended instead; what it said is on standard error."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which shows next
            print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def leave(self) -> None:
        """Ends it."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended with status {self._process.wait()}; what it said is above")
        return line.strip()


def training_rates(python: str, config: Config) -> list[dict[str, Any]]:
    """Figures of training transformers' model of the same configuration. Raises RuntimeError where it fails."""
    peer = Peer(python, "experiments.bench.train_step_transformers", [])
    fastest = peer.ask(to_dict(config))["fastest"]
    peer.leave()
    return fastest
