"""Converts checkpoints between the public layout and ours, a tensor at a time.

    uv run -m experiments.convert --from_hf=DeepSeek-V3 --to=checkpoints/v3
    uv run -m experiments.convert --from=checkpoints/v3 --to_hf=v3-export
    uv run -m experiments.convert --from=runs/tiny --to_hf=tiny-export

An interrupted conversion goes on when the same command is run again; the target gets its name only when it is whole.
docs/checkpoints.md has the name map and what the real model needs.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli

FROM_HF = flags.DEFINE_string("from_hf", None, "Folder in the public layout to read.")
TO = flags.DEFINE_string("to", None, "Checkpoint to write; with --from_hf.")
FROM = flags.DEFINE_string("from", None, "Checkpoint or run (workdir) to read.")
TO_HF = flags.DEFINE_string("to_hf", None, "Folder in the public layout to write; with --from.")
DTYPE = flags.DEFINE_enum("dtype", "source", ["source", "float32", "bfloat16"], "Dtype to write; source: as stored, FP8 with its scales.")
EMA = flags.DEFINE_bool("ema", False, "Export the moving average of a run's parameters.")
SHARD_GB = cli.define_float("shard_gb", 5.0, "Largest .safetensors file, in GB.", lower_bound=0.001)


def main() -> int:
    importing, exporting = (FROM_HF.value, TO.value), (FROM.value, TO_HF.value)
    if all(importing) and not any(exporting):
        return _import(Path(FROM_HF.value), Path(TO.value))
    if all(exporting) and not any(importing):
        return _export(Path(FROM.value), Path(TO_HF.value))
    given = [f"--{flag.name}" for flag in (FROM_HF, TO, FROM, TO_HF) if flag.value]
    raise ConfigError("direction", " ".join(given) or None, "give --from_hf and --to, or --from and --to_hf")


def _import(folder: Path, target: Path) -> int:
    from dsv3_jax.interop.huggingface import open_public
    from dsv3_jax.interop.store import convert

    convert(open_public(folder), folder, target, DTYPE.value)
    print(f"{target} is ready: experiments.evaluate --checkpoint={target}, or experiments.pretrain --config.init_from={target}")
    return 0


def _export(source: Path, target: Path) -> int:
    from dsv3_jax.interop.export import export
    from dsv3_jax.interop.huggingface import read_config
    from dsv3_jax.interop.store import MANIFEST, Store

    shard_bytes = int(SHARD_GB.value * 10**9)
    if (source / MANIFEST).is_file():
        store, manifest = Store(source), source / MANIFEST
        identity = {"source": str(source.resolve()), "written": manifest.stat().st_mtime_ns}
        export(store, target, DTYPE.value, identity, source, read_config(source), store.copies, shard_bytes)
    else:
        _export_run(source, target, shard_bytes)
    print(f"{target} is ready, in the layout that transformers, vLLM and SGLang read")
    return 0


def _export_run(workdir: Path, target: Path, shard_bytes: int) -> None:
    from dsv3_jax.interop.export import export
    from dsv3_jax.interop.weights import ArraySource
    from dsv3_jax.training.run import load_run

    run = load_run(workdir, EMA.value)
    identity = {"source": str(workdir.resolve()), "step": run.step, "ema": EMA.value}
    export(ArraySource(run.config.model, run.params, run.router_bias), target, DTYPE.value, identity, workdir, None, None, shard_bytes)


if __name__ == "__main__":
    cli.run(main)
