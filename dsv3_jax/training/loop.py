"""The training loop: from a configuration and an empty workdir to a trained model, and on from any interruption.

Order within a step: dispatch the step, then report the one before it, so that the device never waits for
the host. Before a checkpoint is written every step up to it has been reported, so the files of a resumed
run read as if it had never stopped.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jax

from dsv3_jax.config import Config
from dsv3_jax.parallel import processes
from dsv3_jax.training.finish import finish_run
from dsv3_jax.training.metrics import MetricsWriter
from dsv3_jax.training.reporting import Reporter
from dsv3_jax.training.stopping import StopSignal, stop_signal
from dsv3_jax.training.trainer import Trainer
from dsv3_jax.training.workdir import CHECKPOINT_DIR, SUMMARY_FILE


def pretrain(config: Config, workdir: Path, command: str) -> int:
    """Trains to `train.steps`, or says that it is done; returns the exit status. Raises ConfigError."""
    with stop_signal() as stop:
        trainer = Trainer(config, workdir)
        try:
            return _run(trainer, workdir, command, stop)
        finally:
            trainer.close()


def _run(trainer: Trainer, workdir: Path, command: str, stop: StopSignal) -> int:
    steps, say = trainer.config.train.steps, processes.say
    if trainer.progress.step >= steps and processes.main_says((workdir / SUMMARY_FILE).exists()):
        say(f"{workdir} is done: {trainer.progress.step} steps. To go on, add --config.train.steps={2 * trainer.progress.step}")
        return 0
    end = _train(trainer, stop)
    if end.skipped >= trainer.config.train.max_skipped_steps:
        saved = workdir / CHECKPOINT_DIR / str(trainer.progress.step)
        say(f"stopped: {end.skipped} steps in a row had a loss or gradient that is not finite. The state before them is saved in {saved}")
        return 1
    if end.stopped:
        say(f"stopped by a signal after step {trainer.progress.step}, saved. The same command continues: {command}")
        return 0
    finish_run(trainer, command)
    return 0


class End(NamedTuple):
    """Why steps ended; the same on all processes."""

    skipped: int  # last steps, in a row
    stopped: bool  # by a signal


def _train(trainer: Trainer, stop: StopSignal) -> End:
    """Runs steps until the last one, a signal, or too many skipped ones, and saves."""
    train, every = trainer.config.train, trainer.config.checkpoint.every
    if trainer.progress.step >= train.steps:
        return End(0, stopped=False)
    with processes.agreed():
        writer = MetricsWriter(trainer.workdir, trainer.progress.step) if processes.is_main() else None
    processes.say("compiling the train step ...")
    trainer.compile()
    with writer or nullcontext(), Reporter(trainer, writer) as reporter:

        def stopped() -> bool:
            return reporter.stopped if jax.process_count() > 1 else stop.received

        while trainer.progress.step < train.steps and not stopped() and reporter.skipped_in_a_row < train.max_skipped_steps:
            reported = trainer.advance(stop.received)
            due = reported.step % train.eval_every == 0 or reported.step == train.steps
            reporter.take(reported, trainer.evaluate if due else None)
            if reported.step % every == 0:
                reporter.flush()
                trainer.save()
                reporter.restart_clock()
        reporter.flush()
        trainer.save()
        return End(reporter.skipped_in_a_row, stopped())
