"""Exponential moving average of the parameters, in host memory, updated beside the next step (V3 sec. 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from dsv3_jax.model.transformer import Params


class HostEMA:
    """`average += (1 - decay) (parameters - average)` after every step, in float32, by one worker thread."""

    def __init__(self, params: Params, decay: float):
        self._decay = decay
        self._average: PyTree[np.ndarray] = jax.tree.map(lambda p: np.array(p, np.float32), params)
        self._worker = ThreadPoolExecutor(1, "ema")
        self._pending: Future[None] | None = None

    def submit(self, params: Params) -> None:
        """Starts the update with these parameters; the caller may donate them at once."""
        self.wait()
        self._pending = self._worker.submit(self._update, _to_host(params))

    def _update(self, params: PyTree) -> None:
        def blend(average: np.ndarray, new: Any) -> None:
            average += np.float32(1.0 - self._decay) * (np.asarray(new) - average)

        jax.tree.map(blend, self._average, params)

    def wait(self) -> None:
        """Until the last update is in; raises what it raised."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def average(self) -> PyTree[np.ndarray]:
        """A copy of the average, which later updates leave alone."""
        self.wait()
        return jax.tree.map(np.copy, self._average)

    def load(self, average: PyTree[np.ndarray]) -> None:
        """Continues from a saved average."""
        self.wait()
        self._average = jax.tree.map(lambda a: np.array(a, np.float32), average)

    def close(self) -> None:
        """Finishes the last update and ends the worker."""
        self.wait()
        self._worker.shutdown()


def _to_host(params: Params) -> PyTree:
    """A copy in host memory: by an asynchronous transfer on an accelerator, by a plain copy on a CPU."""
    if jax.default_backend() == "cpu":
        return jax.tree.map(np.array, params)
    return jax.tree.map(lambda p: jax.device_put(p, p.sharding.with_memory_kind("pinned_host")), params)
