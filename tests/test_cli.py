"""A wrong command ends with status 2 and one line that names the field, its value and the remedy, before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = "--config=configs/tiny.py"
CONFIG_FILE = "from dsv3_jax.config import default_config\ndef get_config():\n    config = default_config()\n    {}\n    return config\n"


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user of the repository runs it, with the devices that this machine has."""
    command = [sys.executable, "-m", f"experiments.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Status 2 and one line on stderr, nothing else, which holds all `parts`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


# Found before JAX is imported, so a third of a second each.
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config = None", "name a configuration file", "configs/tiny.py"]),
        (["--config=configs/tyni.py"], ["--config = 'configs/tyni.py'", "no such file", "configs/tiny.py"]),
        (["--config=configs/__init__.py"], ["--config = 'configs/__init__.py'", "cannot be read", "get_config"]),
        ([TINY, "--config.train.stepz=3"], ["config.train.stepz = '3'", "unknown field, did you mean 'steps'?"]),
        ([TINY, "--config.train.steps=many"], ["config.train.steps = 'many'", "must be int"]),
        ([TINY, "--config.train.steps", "many"], ["config.train.steps = 'many'", "must be int"]),
        ([TINY, "--config.train=3"], ["config.train = '3'", "is a section; set one of its fields"]),
        ([TINY, "--wrokdir=elsewhere"], ["--wrokdir", "elsewhere", "workdir"]),
        ([TINY, "--bogus=17"], ["--bogus", "17", "--help"]),
        ([TINY, "train.steps=3"], ["argument = 'train.steps=3'", "--name=value"]),
        ([TINY, "--config.model.n_routed_experts=15"],
         ["config.model.n_routed_experts = 15", "must be a multiple of model.n_group = 4"]),
        ([TINY, "--config.optimizer.peak_lr=-1"], ["config.optimizer.peak_lr = -1.0", "must be above 0"]),
        ([TINY, "--process_id=0"], ["--process_id = 0", "needs --coordinator --num_processes too"]),
        ([TINY, "--distributed", "--num_processes=2"], ["--num_processes = 2", "--distributed", "not both"]),
        ([TINY, "--coordinator=here", "--num_processes=2", "--process_id=0"], ["--coordinator = 'here'", "must be HOST:PORT"]),
        ([TINY, "--coordinator=here:1", "--num_processes=2", "--process_id=2"], ["--process_id = 2", "must be below --num_processes=2"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--config") else "",
)  # fmt: skip
def test_wrong_arguments(tmp_path: Path, arguments: list[str], parts: list[str]):
    workdir = tmp_path / "run"
    assert_refused(run("pretrain", *arguments, f"--workdir={workdir}"), *parts)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("statement", "parts"),
    [
        ("config.train.stepz = 3", ["config.train.stepz = 3", "did you mean 'steps'?"]),
        ("config.train.steps = 'many'", ["--config", "steps", "many", "int"]),
        ("config.train.steps = 10 / 0", ["--config", "division by zero"]),
    ],
)
def test_wrong_configuration_file(tmp_path: Path, statement: str, parts: list[str]):
    file = tmp_path / "mine.py"
    file.write_text(CONFIG_FILE.format(statement))
    assert_refused(run("pretrain", f"--config={file}", f"--workdir={tmp_path / 'run'}"), *parts)
    assert not (tmp_path / "run").exists()


def test_output_that_is_no_regular_file_stays_what_it_is(tmp_path: Path):
    pipe = tmp_path / "out.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # the report fits into the pipe, and waits there
    done = run("describe", TINY, f"--json={pipe}")
    assert done.returncode == 0, done.stderr
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    assert "parameters" in json.loads(os.read(reader, 2**16))
    os.close(reader)


def test_a_command_starts_again_to_ask_for_huge_pages():
    """Tests have the setting already, so that they wait for no second start."""
    code = "import os; from experiments import cli; cli.run(lambda: print(os.environ.get('GLIBC_TUNABLES')))"
    unset = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unset, capture_output=True, text=True, timeout=60)
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    asked = pages.exists() and "[madvise]" in pages.read_text()
    assert (done.returncode, done.stdout) == (0, "glibc.malloc.hugetlb=1\n" if asked else "None\n"), done.stderr


SEVERAL = ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=0"]


@pytest.mark.parametrize(
    ("keeps", "arguments", "given", "folder"),
    [
        (True, [], {}, "/home/a/.cache/dsv3_jax/programs"),
        (True, [], {"XDG_CACHE_HOME": "/caches"}, "/caches/dsv3_jax/programs"),
        (True, [], {"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        (True, [], {"XDG_CACHE_HOME": "relative"}, None),
        (False, [], {}, None),
        (True, SEVERAL, {}, None),
        (True, ["--distributed"], {}, None),
        (True, SEVERAL, {"JAX_COMPILATION_CACHE_DIR": "/shared"}, "/shared"),
    ],
)
def test_where_a_command_keeps_compiled_programs(keeps: bool, arguments: list[str], given: dict[str, str], folder: str | None):
    shown = "print(__import__('jax').config.jax_compilation_cache_dir)"
    code = f"from experiments import cli, cluster; cluster.define_flags(); cli.run(lambda: {shown}, keeps_programs={keeps})"
    kept = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")}
    environment = kept | {"HOME": "/home/a"} | given
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr


def test_missing_workdir():
    assert_refused(run("pretrain", TINY), "--workdir", "None")


def test_sequences_longer_than_the_model(tmp_path: Path):
    done = run("pretrain", TINY, "--config.train.sequence_length=1024", f"--workdir={tmp_path / 'run'}")
    assert_refused(done, "config.train.sequence_length = 1024", "must be at most model.max_position_embeddings = 512")
    assert not (tmp_path / "run").exists()


def test_source_without_files(tmp_path: Path):
    done = run("pretrain", TINY, "--config.data.source=text:/nowhere/*.txt", f"--workdir={tmp_path / 'run'}")
    assert_refused(done, "config.data.source = 'text:/nowhere/*.txt'", "no file matches", "correct the path or the wildcards")
    assert not (tmp_path / "run").exists()


def test_folder_of_something_else_is_left_alone(tmp_path: Path):
    letter = tmp_path / "letter.txt"
    letter.write_text("dear reader")
    remedy = "exists and is no run's folder; give an empty or a new one"
    assert_refused(run("pretrain", TINY, f"--workdir={tmp_path}"), f"--workdir = '{tmp_path}'", remedy)
    assert list(tmp_path.iterdir()) == [letter]
    assert letter.read_text() == "dear reader"


@pytest.mark.parametrize("module", ["pretrain", "ablations.balancing"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, module: str):
    letter = tmp_path / "letter.txt"
    letter.write_text("dear reader")
    done = run(module, TINY, f"--workdir={letter / 'run'}")
    assert_refused(done, f"--workdir = '{letter / 'run'}'", "no such folder can be made", "name another")


def test_a_study_takes_its_steps_from_one_place(tmp_path: Path):
    done = run("ablations.balancing", TINY, "--config.train.steps=3", f"--workdir={tmp_path / 'run'}")
    assert_refused(done, "config.train.steps = 3", "a study trains for --steps; set that instead")
    assert not (tmp_path / "run").exists()
    assert "--steps: Training steps of every variant, in the place of train.steps" in run("ablations.balancing", "--help").stdout


def test_text_of_domains_is_not_taken_for_what_other_flags_would_find(tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text.made_from.json").write_text('{"--domain_kib": 64, "--folders": []}')
    arguments = [TINY, f"--workdir={tmp_path}"]
    remedy = "give that value or a new --workdir"
    done = run("ablations.specialization", *arguments, "--domain_kib=32")
    assert_refused(done, "--domain_kib = 32", f"{tmp_path / 'text'} was made from 64", remedy)
    done = run("ablations.specialization", *arguments, "--domain_kib=64", "--folders=docs")
    assert_refused(done, f"--folders = ['{ROOT / 'docs'}']", "was made from []", remedy)


def test_haystacks_longer_than_the_text_are_found_before_training(tmp_path: Path):
    micro = ["--config=tests/micro_config.py", "--config.model.vocab_size=600", "--config.train.sequence_length=48"]
    done = run("ablations.long_context", *micro, "--lengths=1,4000", "--trials=1", f"--workdir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert "--lengths = 4000: for haystacks of 192000 tokens the held-out text has" in done.stderr
    assert "step/s" not in done.stderr and not list(tmp_path.glob("short-*.json"))


@pytest.mark.parametrize(("module", "arguments"), [("generate", ["--prompt=def"]), ("evaluate", [])])
def test_no_run_to_use(tmp_path: Path, module: str, arguments: list[str]):
    done = run(module, f"--workdir={tmp_path / 'run'}", *arguments)
    assert_refused(done, f"--workdir = '{tmp_path / 'run'}'", "holds no config.json", "experiments.pretrain")
    assert not (tmp_path / "run").exists()


def test_number_out_of_range():
    assert_refused(run("generate", "--workdir=runs/none", "--prompt=def", "--top_p=2"), "--top_p", "2", "[0.0, 1.0]")


@pytest.mark.parametrize("module", ["pretrain", "generate", "evaluate", "serve", "describe"])
def test_help(module: str):
    done = run(module, "--help")
    assert done.returncode == 0 and done.stderr == ""
    shown = {"pretrain": ["--workdir", "--config"], "describe": ["--config", "--json"]}.get(module, ["--workdir", "--ema"])
    if "--config" in shown:
        shown += ["optimizer.peak_lr: float", "model.n_routed_experts: int", "--config.NAME=VALUE"]
    for part in [*shown, f"uv run -m experiments.{module}"]:
        assert part in done.stdout, part
    assert "absl" not in done.stdout


@pytest.mark.parametrize(
    ("module", "flag", "reason"),
    [
        ("generate", "--temperature=nan", "not a finite number"),
        ("generate", "--temperature=inf", "not a finite number"),
        ("generate", "--top_p=nan", "not a finite number"),
        ("generate", f"--seed={2**32}", f"[0, {2**32 - 1}]"),
        ("placement", f"--seed={2**32}", f"[0, {2**32 - 1}]"),
        ("serve", "--timeout=nan", "not a finite number"),
        ("convert", "--shard_gb=nan", "not a finite number"),
        ("convert", "--shard_gb=0", "0.001"),
        ("describe", "--tokens=nan", "not a finite number"),
        ("describe", "--utilisation=nan", "not a finite number"),
        ("pipeline", "--F=nan", "not a finite number"),
        ("pipeline", "--B=inf", "not a finite number"),
        ("pipeline", "--W=nan", "not a finite number"),
        ("pipeline", "--FB=inf", "not a finite number"),
        ("pipeline", "--communication=inf", "not a finite number"),
        ("bench.dispatch", "--bound=nan", "not a finite number"),
        ("bench.deploy", "--dispatch_bound=nan", "not a finite number"),
        ("bench.deploy", "--dispatch_bound=0.5", ">= 1.0"),
        ("bench.transports", "--bound=nan", "not a finite number"),
    ],
)
def test_numbers_that_bounds_let_through(module: str, flag: str, reason: str):
    needed = {"generate": ["--workdir=runs/none", "--prompt=def"], "serve": ["--workdir=runs/none"], "placement": ["--loads=none.npy"]}
    others = [TINY] if module.startswith(("describe", "bench.")) else []
    assert_refused(run(module, *needed.get(module, others), flag), flag.split("=")[0], flag.split("=")[1], reason)


def test_prompt_that_is_not_utf8():
    done = run("generate", "--workdir=runs/none", "--prompt=" + b"a\xffb".decode(errors="surrogateescape"))
    assert_refused(done, r"--prompt = 'a\udcffb'", "is not valid UTF-8")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("x" * 253, "File name too long"), ("/proc/x.json", "no such file can be made")],
    ids=["long", "long-with-tmp", "proc"],
)
def test_output_that_cannot_be_written(tmp_path: Path, name: str, reason: str):
    file = tmp_path / name  # an absolute name stays as it is
    assert_refused(run("describe", TINY, f"--json={file}"), f"--json = '{file}'", reason, "name another")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_cannot_be_written_are_refused_before_a_model_is_read(tmp_path: Path):
    file = tmp_path / "no" / "logits.npy"
    done = run("evaluate", f"--workdir={tmp_path / 'run'}", "--tokens=tokens.npy", f"--logits_out={file}")
    assert_refused(done, f"--logits_out = '{file}'", "there is no folder")


def test_a_run_that_calls_no_kernel_does_not_import_them():
    """Mosaic GPU takes a second of every command's start."""
    code = "import sys, dsv3_jax.training.run; sys.exit('jax.experimental.pallas.mosaic_gpu' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
