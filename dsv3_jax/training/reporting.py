"""Turns finished steps into lines of metrics and a progress bar."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dsv3_jax.config import Config
from dsv3_jax.training.evaluate import Evaluation
from dsv3_jax.training.metrics import MetricsWriter, max_vio
from dsv3_jax.training.schedule import StepPlan
from dsv3_jax.training.step import StepMetrics
from dsv3_jax.training.trainer import Reported, Trainer

# Rows of expert_load.jsonl that a run leaves, about.
_LOAD_ROWS = 160


class Reporter:
    """Writes finished steps to the metrics files and the progress bar; without a writer it follows a run that another process reports."""

    def __init__(self, trainer: Trainer, writer: MetricsWriter | None):
        self.trainer, self.writer = trainer, writer
        config = trainer.config
        steps = config.train.steps
        self.bar = tqdm(total=steps, initial=trainer.progress.step, unit="step", dynamic_ncols=True, disable=writer is None)
        self.load_every = max(1, steps // _LOAD_ROWS)
        self.since = time.perf_counter()
        self.pending: Reported | None = None
        self.skipped_in_a_row = 0
        self.stopped = False  # whether a process had been told to stop when the last reported step was dispatched

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def take(self, reported: Reported, evaluate: Callable[[], Evaluation] | None = None) -> None:
        """Reports the step before and keeps this one; reports this one too when it is to be evaluated, or has run already as on a CPU."""
        self.flush()
        self.pending = reported
        if evaluate is not None or jax.default_backend() == "cpu":
            self.flush(evaluate)

    def flush(self, evaluate: Callable[[], Evaluation] | None = None) -> None:
        """Reports the step that is waiting."""
        if self.pending is None:
            return
        step, plan, metrics = self.pending.step, self.pending.plan, jax.device_get(self.pending.metrics)
        self.stopped = bool(self.pending.stop)
        self.pending = None
        row = self._row(step, plan, metrics)
        if evaluate is not None:
            evaluation = evaluate()
            self.restart_clock()
            row |= {"val_loss": evaluation.loss, "val_bits_per_byte": evaluation.bits_per_byte}
            row |= {} if evaluation.mtp_accuracy is None else {"val_mtp_accuracy": evaluation.mtp_accuracy}
        self.skipped_in_a_row = int(metrics.skipped_in_a_row)
        if self.writer:
            self.writer.write(row)
            self._write_load(self.writer, step, metrics)
        self.bar.update()
        self.bar.set_postfix_str(_postfix(row))

    def _row(self, step: int, plan: StepPlan, metrics: StepMetrics) -> dict[str, Any]:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        self.trainer.progress.seconds += seconds
        tokens = plan.batch_size * self.trainer.config.train.sequence_length
        row = {
            "step": step,
            "tokens": plan.tokens,
            "loss": metrics.main.nll / metrics.main.tokens,
            "balance_loss": metrics.balance_loss / max(len(layer_names(self.trainer.config)), 1),
            "learning_rate": plan.learning_rate,
            "grad_norm": metrics.grad_norm,
            "batch_size": plan.batch_size,
            "tokens_per_second": tokens / seconds,
            "skipped": int(metrics.skipped_in_a_row > 0),
        }
        if metrics.mtp:
            row["mtp_loss"] = np.mean([m.nll / m.tokens for m in metrics.mtp])
        if load := _load_shares(metrics):
            row["max_vio"] = float(max_vio(np.stack(load)).mean())
        return row

    def _write_load(self, writer: MetricsWriter, step: int, metrics: StepMetrics) -> None:
        load = _load_shares(metrics)
        if load and (step % self.load_every == 0 or step == 1):
            writer.write_load(step, np.stack(load), layer_names(self.trainer.config))

    def restart_clock(self) -> None:
        """Keeps what is no training (compilation, evaluation, saving) out of tokens/s."""
        self.since = time.perf_counter()


def _load_shares(metrics: StepMetrics) -> list[np.ndarray]:
    rows = np.concatenate([metrics.load.moe, metrics.load.mtp])
    return [row / row.sum() for row in rows]


def layer_names(config: Config) -> list[str]:
    """Names of the layers with a router, in the order of their loads."""
    m = config.model
    main = [f"layer {m.num_dense_layers + i + 1}" for i in range(m.num_moe_layers)]
    return main + [f"mtp {k + 1}" for k in range(m.num_nextn_predict_layers)]


def _postfix(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    parts += [f"mtp {row['mtp_loss']:.3f}"] if "mtp_loss" in row else []
    parts += [f"MaxVio {row['max_vio']:.2f}"] if "max_vio" in row else []
    return ", ".join([*parts, f"lr {row['learning_rate']:.1e}", f"{row['tokens_per_second']:,.0f} tok/s"])
