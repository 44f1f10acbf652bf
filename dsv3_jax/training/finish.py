"""The end of a run: a last evaluation, sampled completions, summary and report."""

import logging
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.inference.decode import generate
from dsv3_jax.parallel import processes
from dsv3_jax.training.evaluate import Evaluation
from dsv3_jax.training.metrics import read_jsonl, write_json
from dsv3_jax.training.trainer import Trainer
from dsv3_jax.training.workdir import CHECKPOINT_DIR, SAMPLES_FILE, SUMMARY_FILE

_log = logging.getLogger(__name__)

_SAMPLES = 3
_SAMPLE_TOKENS = 64  # of the prompt, and of its continuation


def finish_run(trainer: Trainer, command: str) -> None:
    """Writes samples.json, summary.json and report.html, and prints the summary. Processes evaluate together, main does the rest."""
    from dsv3_jax.training.report import write_report  # matplotlib takes seconds to load, and only a finished run needs it

    processes.say("evaluating, sampling and writing the report ...")
    samples = sample_completions(trainer)
    evaluation, average = trainer.evaluate(), trainer.evaluate(use_ema=True) if trainer.ema else None
    if not processes.is_main():
        return
    write_json(trainer.workdir / SAMPLES_FILE, samples)
    summary = summarise(trainer, command, evaluation, average)
    write_json(trainer.workdir / SUMMARY_FILE, summary)
    print_summary(summary, trainer.workdir, write_report(trainer.workdir))


def sample_completions(trainer: Trainer) -> list[dict[str, str]]:
    """Completions of held-out documents from a point inside each, beside what really followed."""
    length = min(_SAMPLE_TOKENS, trainer.config.model.max_position_embeddings // 2)
    texts = [(i, trainer.tokenizer.encode(trainer.corpus.valid[i]).ids) for i in _spread(len(trainer.corpus.valid))]
    chosen = [(i, ids) for i, ids in texts if len(ids) >= 4 * length][:_SAMPLES]
    if not chosen:
        return []
    starts = [len(ids) // 2 for _, ids in chosen]
    prompts = [ids[s : s + length] for (_, ids), s in zip(chosen, starts, strict=True)]
    model = (trainer.state.params, trainer.state.router_bias)
    if not processes.fits_one_device(model, trainer.mesh):
        _log.warning("no samples: generation runs on one device, and the whole parameters take more than half of its memory")
        return []
    if (gathered := processes.whole_on_main(model, trainer.mesh)) is None:
        return []
    params, bias = gathered
    steps = generate(
        params, bias, prompts, trainer.config.model, trainer.execution,
        max_new_tokens=length, temperature=0.7, top_p=0.9, key=jax.random.key(trainer.config.train.seed),
    )  # fmt: skip
    completions = np.stack(list(steps), axis=1)
    decode = lambda ids: trainer.tokenizer.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    return [
        {
            "prompt": decode(prompt),
            "completion": decode(completion),
            "reference": decode(ids[start + length : start + 2 * length]),
            "source": trainer.corpus.valid.name(i),
        }
        for (i, ids), start, prompt, completion in zip(chosen, starts, prompts, completions, strict=True)
    ]


def _spread(count: int) -> list[int]:
    """Up to 24 indices spread evenly over `count`."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, 24))})


def summarise(trainer: Trainer, command: str, evaluation: Evaluation, average: Evaluation | None) -> dict[str, Any]:
    """The figures of a finished run; `average`: the evaluation of its moving average."""
    rates = [row["tokens_per_second"] for row in read_jsonl(trainer.workdir / "metrics.jsonl")]
    summary = {
        "val_loss": evaluation.loss,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "mtp_accuracy": evaluation.mtp_accuracy,
        "tokens_per_second": float(np.median(rates)),
        "peak_memory_bytes": peak_memory(),
        "steps": trainer.progress.step,
        "tokens": trainer.progress.tokens,
        "seconds": trainer.progress.seconds,
        "compile_seconds": trainer.compile_seconds,
        "parameters": sum(p.size for p in jax.tree.leaves(trainer.state.params)),
        "command": command,
        "continue_command": f"{_without_steps(command)} --config.train.steps={2 * trainer.progress.step}",
    }
    if average:
        summary["ema_val_loss"] = average.loss
    return summary


def _without_steps(command: str) -> str:
    return " ".join(word for word in command.split(" ") if not word.startswith("--config.train.steps="))


def peak_memory() -> int:
    """Bytes: the most that was in use on the first accelerator, or by this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_summary(summary: dict[str, Any], workdir: Path, report: Path) -> None:
    """A dozen lines a person reads at the end of a run."""
    accuracy = summary["mtp_accuracy"]
    lines = [
        f"steps            {summary['steps']:,} ({summary['tokens']:,} tokens)",
        f"time             {summary['seconds']:.0f} s of training, {summary['compile_seconds']:.0f} s of compilation",
        f"validation loss  {summary['val_loss']:.4f} nats a token, {summary['val_bits_per_byte']:.4f} bits a byte",
        f"second token     {'no MTP' if accuracy is None else f'{accuracy:.1%} right'}",
        f"throughput       {summary['tokens_per_second']:,.0f} tokens/s (median)",
        f"peak memory      {summary['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"report           {report}",
        f"checkpoints      {workdir / CHECKPOINT_DIR}",
        f"sample from it   uv run -m experiments.generate --workdir={workdir} --prompt='def read('",
        f"continue         {summary['continue_command']}",
    ]
    print("\n".join(["", *lines]))
