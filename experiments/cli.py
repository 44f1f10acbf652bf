"""The command line of every experiment: flags, help, and errors a person can act on.

A wrong flag or configuration prints one line that names the field, its value and the remedy, and exits
with status 2 before anything is written.
"""

import gc
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from dsv3_jax.config import Config, ConfigError, check_override, describe_fields, from_config_dict, is_optional_field, nearest_name

flags.disclaim_key_flags()  # the flags belong to the experiment that defines them, and show in its --help

FLAGS = flags.FLAGS
_none_fields: list[str] = []


def run(main: Callable[[], int | None], keeps_programs: bool = True) -> None:
    """Parses the flags, calls `main()`, and exits with what it returns; the `__main__` module's docstring heads `--help`.

    `keeps_programs`: what JAX compiles is kept for later starts. Commands that time compilation keep none.
    """
    _use_huge_pages()
    try:
        app.run(lambda _: _quietly(main, keeps_programs), flags_parser=_parse)
    except (ConfigError, flags.Error) as error:
        fail(str(error))
    except ValueError as error:
        if type(error).__name__ != "CheckpointError":  # named, not imported: --help and wrong flags answer before JAX is loaded
            raise
        fail(str(error))


def _quietly(main: Callable[[], int | None], keeps_programs: bool) -> int:
    # absl's own format is made for servers, and orbax narrates every file at INFO through its logger.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.WARNING)
    gc.set_threshold(100_000, 20, 20)  # tracing makes many objects that live on: to look for garbage among them takes a tenth of a start
    if keeps_programs:
        _keep_programs()
    return main() or 0


def _use_huge_pages() -> None:
    """Starts the process again with a malloc that asks for huge pages, where Linux leaves that to the program.

    XLA on a CPU takes fresh memory for every step; with pages of 4 KiB their faults were a fifth of a step of `tiny`.
    glibc reads the setting only at the start of a process. An existing GLIBC_TUNABLES is left as it is.
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" not in os.environ and setting.exists() and "[madvise]" in setting.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def _keep_programs() -> None:
    """Names the folder in which JAX, which must not be loaded yet, keeps compiled programs, unless JAX_COMPILATION_CACHE_DIR does.

    A program is known by its code, JAX's version and the kind of device. JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    # Of several processes only the first writes. Where they share no folder it alone would find its program, while the others
    # compile and wait for its share of XLA's autotuning.
    one_of_several = any(FLAGS[name].value for name in ("distributed", "coordinator") if name in FLAGS)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches) and not one_of_several:  # who has no home has no cache
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "dsv3_jax", "programs"))


def fake_devices(count: int, only_compile: bool = False) -> None:
    """Makes JAX, which must not be loaded yet, see the CPU as so many devices, and nothing else.

    `only_compile`: programs are not run, so they need no optimisation; and bf16, which a CPU would widen to float32 in
    nearly every operation, collectives too, stays as it is on an accelerator.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags_of_xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    if only_compile:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        flags_of_xla += " --xla_disable_hlo_passes=float-normalization-bf16"
    os.environ["XLA_FLAGS"] = flags_of_xla


def fail(message: str) -> None:
    """Prints one line and exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def define_config() -> flags.FlagHolder:
    """The `--config` flag: a Python file with get_config(); `--config.a.b=c` overrides a field."""
    return config_flags.DEFINE_config_file(
        "config", None, "Configuration file, e.g. configs/tiny.py; --config.SECTION.FIELD=VALUE overrides."
    )


class _FiniteParser(flags.FloatParser):
    def convert(self, argument: int | float | str) -> float:
        value = super().convert(argument)
        if not math.isfinite(value):  # NaN is outside no bounds
            raise ValueError(f"{value} is not a finite number")
        return value


def define_float(
    name: str, default: float | None, text: str, lower_bound: float | None = None, upper_bound: float | None = None
) -> flags.FlagHolder:
    """A flag with a number that is neither NaN nor infinite, which `flags.DEFINE_float` lets through."""
    return flags.DEFINE(_FiniteParser(lower_bound, upper_bound), name, default, text, serializer=flags.ArgumentSerializer())


def define_seed(text: str) -> flags.FlagHolder:
    """The `--seed` flag, as large as a random key takes: JAX drops the bits above that, so that larger seeds would repeat."""
    return flags.DEFINE_integer("seed", 0, text, lower_bound=0, upper_bound=2**32 - 1)


def read_config(holder: flags.FlagHolder) -> Config:
    """The frozen configuration. Raises ConfigError."""
    holder.value.update_from_flattened_dict(dict.fromkeys(_none_fields))
    return from_config_dict(holder.value)


def command_line() -> str:
    """The command that was run, to show to the user who wants to repeat it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {spec.name}" if spec else sys.argv[0]
    return f"uv run {name} {shlex.join(sys.argv[1:])}"


def _parse(argv: Sequence[str]) -> list[str]:
    if any(arg in ("--help", "-h", "-help", "--helpshort", "--helpfull") for arg in argv[1:]):
        print(_help())
        sys.exit(0)
    if "config" in FLAGS:
        _check_config_arguments(argv[1:])
        argv = _take_none(argv)
    try:
        rest = FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        remedy = f"unknown flag, {nearest_name(error.flagname, _flag_names())}; see --help"
        raise ConfigError(f"--{error.flagname}", error.flagvalue.partition("=")[2], remedy) from error
    except flags.IllegalFlagValueError as error:
        *traceback, reason = str(error).strip().splitlines()
        if not traceback:
            raise
        raise ConfigError("--config", _config_file(argv[1:]), f"cannot be read: {reason}") from error
    except flags.Error:
        raise
    except Exception as error:  # a configuration file is a program and can raise anything
        raise ConfigError("--config", _config_file(argv[1:]), f"cannot be read: {type(error).__name__}: {error}") from error
    if len(rest) > 1:
        raise ConfigError("argument", rest[1], "unexpected; options are written --name=value")
    return rest


def _take_none(argv: Sequence[str]) -> list[str]:
    """The arguments without `--config.field=None`, which ml_collections cannot parse; `read_config` sets those fields."""
    kept = []
    for arg in argv:
        field, _, value = arg.lstrip("-").partition("=")
        if field.startswith("config.") and value.lower() == "none" and is_optional_field(field.removeprefix("config.")):
            _none_fields.append(field.removeprefix("config."))
        else:
            kept.append(arg)
    return kept


def _flag_names() -> list[str]:
    return [flag.name for flag in FLAGS.get_flags_for_module(sys.modules["__main__"])]


def _config_file(arguments: Sequence[str]) -> str | None:
    for i, arg in enumerate(arguments):
        if arg.lstrip("-").startswith("config="):
            return arg.split("=", 1)[1]
        if arg.lstrip("-") == "config" and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def _check_config_arguments(arguments: Sequence[str]) -> None:
    path = _config_file(arguments)
    known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py") if p.name != "__init__.py"))
    if path is None:
        raise ConfigError("--config", path, f"name a configuration file (here: {known})")
    if not Path(path.split(":")[0]).is_file():
        raise ConfigError("--config", path, f"no such file (here: {known})")
    for i, arg in enumerate(arguments):
        if arg.lstrip("-").startswith("config."):
            field, equals, value = arg.lstrip("-").partition("=")
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            check_override(field.removeprefix("config."), value if equals else following)


def _help() -> str:
    main = sys.modules["__main__"]
    parts = [(main.__doc__ or "").strip(), "\nflags:"]
    for flag in FLAGS.get_flags_for_module(main) or ():
        default = "" if flag.default in (None, "") else f" (default {flag.default_as_str})"
        parts.append(f"  --{flag.name}: {flag.help}{default}")
    if "config" in FLAGS:
        parts += ["\nfields, each set by --config.NAME=VALUE:", describe_fields()]
    return "\n".join(parts)
