"""The pieces of a run, put together from a configuration and a workdir: data, model, optimizer, steps, checkpoints."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from dsv3_jax.config import Config
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel import processes
from dsv3_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.training.checkpoint import Checkpointer, abstract_like
from dsv3_jax.training.corpus import open_corpus
from dsv3_jax.training.data import TrainLoader, merge_states, validation_rows
from dsv3_jax.training.ema import HostEMA, host_sharding
from dsv3_jax.training.evaluate import Evaluation, evaluate
from dsv3_jax.training.initial import check_initial, load_initial, with_tokenizer_of
from dsv3_jax.training.lowered import batch_arguments
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import StepPlan, plan_step
from dsv3_jax.training.state import TrainState, create_state
from dsv3_jax.training.step import Rates, StepMetrics, jit_train_step, make_eval_step, make_train_step
from dsv3_jax.training.tokenizer import Vocabulary, load_or_train_tokenizer
from dsv3_jax.training.workdir import CHECKPOINT_DIR, check_continues, new_workdir

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """Where the run stands, on the host; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Reported:
    """A step that was dispatched and is yet to be reported."""

    step: int
    plan: StepPlan
    metrics: StepMetrics
    stop: bool | Bool[Array, ""]  # whether a process was told to stop before it


class Trainer:
    """The pieces of a run, put together once; `train` drives them."""

    def __init__(self, config: Config, workdir: Path):
        self.workdir = workdir
        with processes.agreed():
            self.mesh = make_mesh(config.parallel.mesh)
            config = self.config = with_tokenizer_of(config)
            self.corpus = open_corpus(config.data)
            check_continues(workdir, config)
            if config.init_from:
                check_initial(config)
        with new_workdir(workdir, config), processes.main_first():
            self._open_text()
        self.optimizer = make_optimizer(config.optimizer)
        self.micro_batches = config.train.batch_size // config.train.micro_batch_size
        self.create = functools.partial(create_state, self.config, self.optimizer, self.mesh)
        self.shardings = state_shardings(jax.eval_shape(self.create), self.mesh)
        self._build_steps()
        self._restore_or_create()
        self.compile_seconds = 0.0

    def _open_text(self) -> None:
        data, length = self.config.data, self.config.train.sequence_length
        self.tokenizer = load_or_train_tokenizer(self.workdir, data, self.config.model.vocab_size, self.corpus.train)
        self.vocabulary = Vocabulary.from_tokenizer(self.tokenizer, data)
        self.execution = Execution.of(self.config, self.vocabulary.eos_id)
        most = self.config.train.eval_sequences
        self.eval_rows = validation_rows(self.corpus.valid, self.tokenizer, self.vocabulary, length, most)
        part = processes.feeding(self.mesh)
        self.loader = TrainLoader(self.corpus.train, self.tokenizer, self.vocabulary, data, length, *part)

    def _build_steps(self) -> None:
        config, shared = self.config, replicated(self.mesh)
        step = make_train_step(config, self.execution, self.optimizer, self.mesh)
        self.train_step: Any = jit_train_step(step, (self.shardings, shared))
        self.eval_step = jax.jit(make_eval_step(config, self.execution, self.mesh), out_shardings=shared)

    def _restore_or_create(self) -> None:
        config = self.config
        abstract = abstract_like(jax.eval_shape(self.create), self.shardings)
        self.checkpointer = Checkpointer(self.workdir / CHECKPOINT_DIR, config.checkpoint.keep)
        has_ema = config.train.ema_decay > 0
        average_like = abstract.params if jax.process_count() > 1 else abstract_like(abstract.params, host_sharding())
        restored = self.checkpointer.restore(abstract, average_like if has_ema else None)
        self.progress = Progress()
        if restored is None:
            self.state: TrainState = jax.jit(self.create, out_shardings=self.shardings)()
            if config.init_from:
                params, bias = load_initial(config, self.mesh)
                self.state = self.state._replace(params=params, router_bias=bias)
        else:
            self.state, self.progress = restored.state, Progress(**restored.run["progress"])
            self.loader.restore(restored.run["data"])
            _log.info("continuing after step %d", self.progress.step)
        self.ema = HostEMA(self.state.params, config.train.ema_decay) if has_ema else None
        if self.ema and restored is not None and restored.ema is not None:
            self.ema.load(restored.ema)

    def compile(self) -> None:
        """Compiles the train step before the first one is timed."""
        started = time.perf_counter()
        arguments = batch_arguments(self.config, self.mesh)
        self.train_step = self.train_step.lower(abstract_like(self.state, self.shardings), *arguments).compile()
        self.compile_seconds = time.perf_counter() - started

    def next_rows(self, sequences: int) -> jax.Array:
        """Rows of the next batch as [micro, b, T + 1]; micro-batches that the ramp does not use yet are zeros."""
        micro = self.config.train.micro_batch_size
        mine = self.loader.next_micro_batches(sequences // micro, micro, self.micro_batches)
        return jax.make_array_from_process_local_data(batch_sharding(self.mesh), mine, (len(mine), micro, mine.shape[-1]))

    def advance(self, stop: bool = False) -> Reported:
        """Dispatches one step; `stop`: this process is told to stop, which all learn from what is returned."""
        plan = plan_step(self.progress.tokens, self.config)
        micro = plan.batch_size // self.config.train.micro_batch_size
        numbers = (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)
        micro, *rates = processes.put((np.int32(micro), *map(np.float32, numbers)), replicated(self.mesh))
        rows, stop_any = self.next_rows(plan.batch_size), processes.any_process(stop, self.mesh)

        def step() -> StepMetrics:
            self.state, metrics = self.train_step(self.state, rows, micro, Rates(*rates))
            return metrics

        metrics = self._until_it_fits(step)
        self.progress.step, self.progress.tokens = self.progress.step + 1, plan.tokens
        if self.ema:
            self.ema.submit(self.state.params)
        return Reported(self.progress.step, plan, metrics, stop_any)

    def evaluate(self, use_ema: bool = False) -> Evaluation:
        """The model as it stands, or its moving average, on the validation rows."""
        average = self.ema.average if use_ema and self.ema else None
        params = self.state.params if average is None else jax.device_put(average, self.shardings.params)
        place = lambda rows: processes.put(rows, NamedSharding(self.mesh, P(BATCH_AXES)))  # noqa: E731
        batch, lengths = self.config.train.micro_batch_size, self.vocabulary.byte_lengths
        step = lambda *arguments: self._until_it_fits(lambda: self.eval_step(*arguments))  # noqa: E731
        return evaluate(
            step, params, self.state.router_bias, self.eval_rows, batch, lengths, self.execution.document_eos, place,
            self.config.parallel.mesh.batch_devices,
        )  # fmt: skip

    def _until_it_fits(self, step: Callable[[], Any]) -> Any:
        """The result of a step whose tokens all fitted into the dispatch buffers; those grow, and it is made again, until they do."""
        while True:
            result, parallel = step(), self.config.parallel
            if parallel.dispatch_bound is None or result.fullness <= 1:
                return result
            bound = 2 * parallel.dispatch_bound
            _log.warning("a dispatch buffer was %.4g times too small: made again with parallel.dispatch_bound = %g", result.fullness, bound)
            self.config = dataclasses.replace(self.config, parallel=dataclasses.replace(parallel, dispatch_bound=bound))
            self._build_steps()
            self.compile()

    def save(self) -> None:
        """Starts a checkpoint of this step."""
        states = processes.collect(self.loader.state())
        run = {"progress": dataclasses.asdict(self.progress), "data": merge_states(states) if states else {}}  # main's is written
        self.checkpointer.save(self.progress.step, self.state, self.ema.average if self.ema else None, run)

    def close(self) -> None:
        """Waits for the last checkpoint and ends the worker threads."""
        self.checkpointer.close()
        self.loader.close()
