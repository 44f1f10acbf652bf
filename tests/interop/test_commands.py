"""Public checkpoints through the commands, as users run them: convert, evaluate, generate, train on, and what is refused."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv3_jax.config import ConfigError, from_config_dict
from dsv3_jax.inference.chat import render_chat
from dsv3_jax.interop.huggingface import open_public
from dsv3_jax.interop.safetensors import CheckpointError, read_folder
from dsv3_jax.interop.store import convert
from dsv3_jax.model.transformer import Execution, RouterBias
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.evaluate import write_logits
from dsv3_jax.training.initial import check_initial, load_initial, with_tokenizer_of
from dsv3_jax.training.run import _eos_ids
from dsv3_jax.training.tokenizer import train_tokenizer
from tests import micro_config
from tests.interop.folders import golden, public_folder, write_random
from tests.small import model, parameters
from tests.test_cli import ROOT, assert_refused, run

MICRO = from_config_dict(micro_config.get_config())
# One MoE layer and no MTP module compile in half the time.
ONE_LAYER = {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0, "num_hidden_layers": 1}
SMALLER = dataclasses.replace(MICRO, model=dataclasses.replace(MICRO.model, **ONE_LAYER))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|reply|>{% endif %}"
)

HELLO = [{"role": "user", "content": "hello"}]


def command(name, *arguments):
    """Runs a command that must end well."""
    done = run(name, *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A public folder of the micro configuration's model, with a tokenizer and a chat template."""
    folder = write_random(tmp_path_factory.mktemp("micro") / "public", SMALLER.model)
    train_tokenizer([(ROOT / "README.md").read_text()], 300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|eos|>"}, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (2, 12)))
    return path


@pytest.mark.slow
def test_converted_and_public_checkpoint_give_the_same_logits(tmp_path):
    arrays = golden("mtp")
    public_folder(tmp_path / "public", "mtp")
    np.save(tmp_path / "tokens.npy", arrays["input_ids"])
    done = command("convert", f"--from_hf={tmp_path / 'public'}", f"--to={tmp_path / 'store'}")
    assert f"--config.init_from={tmp_path / 'store'}" in done.stdout
    for flag, folder in (("checkpoint", "store"), ("hf", "public")):
        out = f"--logits_out={tmp_path / f'{flag}.npy'}"
        command("evaluate", f"--{flag}={tmp_path / folder}", f"--tokens={tmp_path / 'tokens.npy'}", out)
    ours, theirs = np.load(tmp_path / "checkpoint.npy"), arrays["logits"]
    np.testing.assert_array_equal(ours, np.load(tmp_path / "hf.npy"))
    assert ours.dtype == np.float32 and np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_and_exports_what_it_has(public, tokens, tmp_path):
    store, workdir, back = tmp_path / "store", tmp_path / "run", tmp_path / "back"
    convert(open_public(public), public, store, "source")
    # Updates of 1e-30 round away: the exported weights are those that training started from.
    overrides = {
        "init_from": store, "optimizer.peak_lr": 1e-30, "optimizer.final_lr": 0.0, "optimizer.tail_lr": 0.0,
        "train.steps": 2, "train.eval_sequences": 2, "train.ema_decay": 0.0, "train.batch_size": 2,
        **{f"model.{name}": value for name, value in ONE_LAYER.items()},
    }  # fmt: skip
    options = [f"--config.{name}={value}" for name, value in overrides.items()]
    command("pretrain", "--config=tests/micro_config.py", f"--workdir={workdir}", *options)
    assert (workdir / "metrics.jsonl").read_text().count("\n") == 2
    ours, theirs = (json.loads((folder / "tokenizer.json").read_text()) for folder in (workdir, public))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]

    command("convert", f"--from={workdir}", f"--to_hf={back}", "--shard_gb=0.001")
    given, trained = read_folder(public), read_folder(back)
    assert sorted(trained) == sorted(given)
    for name, tensor in given.items():
        before, after = tensor.read(), trained[name].read()
        if name.endswith("e_score_correction_bias"):  # moved by two steps of 0.001 at most
            assert 0 < np.abs(after - before).max() < 0.0021
        else:
            assert after.tobytes() == before.tobytes(), name

    for flag, folder in (("hf", back), ("workdir", workdir)):
        command("evaluate", f"--{flag}={folder}", f"--tokens={tokens}", f"--logits_out={tmp_path / f'{flag}.npy'}")
    np.testing.assert_array_equal(np.load(tmp_path / "hf.npy"), np.load(tmp_path / "workdir.npy"))


@pytest.mark.slow
def test_generation_with_a_prompt_a_chat_and_an_end(public, tmp_path):
    folder = tmp_path / "public"
    shutil.copytree(public, folder)
    rendered = "<|eos|><|user|>hello<|reply|>"
    options = (f"--hf={folder}", "--temperature=0", "--max_tokens=4")
    chat = command("generate", *options, "--chat", "--prompt=hello")
    assert "4 tokens in" in chat.stderr
    # The same prompt spelt out gives the same first token; every token but that one ends the text.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [token for token in range(300) if not chat.stdout.startswith(tokenizer.decode([token], skip_special_tokens=False) or "?")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    ended = command("generate", *options, f"--prompt={rendered}")
    assert 1 <= int(ended.stderr.split(" tokens in")[0].split()[-1]) < 4
    assert (rendered + chat.stdout).startswith(ended.stdout)


@pytest.mark.slow
def test_a_killed_conversion_goes_on(tmp_path):
    config = model(num_hidden_layers=4, n_routed_experts=64, num_nextn_predict_layers=0, hidden_size=8, moe_intermediate_size=4)
    folder, target = write_random(tmp_path / "public", config), tmp_path / "store"
    arguments = (f"--from_hf={folder}", f"--to={target}")
    journal = tmp_path / "store.partial" / "done.txt"
    line = [sys.executable, "-m", "experiments.convert", *arguments]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 100
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 100) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = journal.read_text().splitlines()
    assert 100 < len(written) < len(read_folder(folder)) and not target.exists()
    chunks = [path for path in (journal.parent / "arrays").glob("*/c/**/*") if path.is_file() and not path.name.endswith(".__lock")]
    stamps = {path.relative_to(journal.parent): path.stat().st_mtime_ns for path in chunks}

    assert run("convert", *arguments).returncode == 0
    again = sum((target / path).stat().st_mtime_ns != stamp for path, stamp in stamps.items())
    assert len(stamps) >= len(written) and again <= 1  # the tensor that the kill fell into
    convert(open_public(folder), folder, tmp_path / "undisturbed", "source")
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (target, tmp_path / "undisturbed")
    ]
    assert contents[0] == contents[1]


# --- what is refused ---


@pytest.mark.slow
def test_commands_refuse_in_one_line_and_write_nothing(tmp_path):
    hf, pickles, there, new = (tmp_path / name for name in ("public", "pickles", "there", "new"))
    public_folder(hf, "compressed_grouped")
    pickles.mkdir()
    there.mkdir()
    shutil.copy(hf / "config.json", pickles)
    (pickles / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    directions = "give --from_hf and --to, or --from and --to_hf"
    assert_refused(run("convert"), "direction = None", directions)
    assert_refused(run("convert", f"--from_hf={hf}"), "direction = '--from_hf'", directions)
    assert_refused(
        run("convert", f"--from_hf={hf}", f"--to={new}", f"--from={hf}", f"--to_hf={new}"), "--from_hf --to --from --to_hf", directions
    )
    assert_refused(run("convert", f"--from_hf={tmp_path / 'none'}", f"--to={new}"), "config.json in ", "none: cannot be read")
    assert_refused(run("convert", f"--from_hf={hf}", f"--to={there}"), f"target = '{there}'", "exists; give a new folder")
    assert_refused(run("convert", f"--from_hf={pickles}", f"--to={new}"), "pytorch_model.bin", "is a pickle", "safe_serialization=True")
    assert_refused(run("evaluate", f"--hf={hf}", f"--checkpoint={there}"), "--checkpoint --hf", "exactly one of")
    assert_refused(run("evaluate", f"--hf={hf}", f"--tokens={new}"), "--tokens", "and --logits_out go together")
    assert_refused(run("evaluate", f"--hf={hf}", f"--tokens={new}", f"--logits_out={new}"), f"--tokens = '{new}'", "is no .npy file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickles", "public", "there"]
    assert not list(there.iterdir())


class Runs:
    def __reduce__(self):
        return (print, ("a pickle ran",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3)), "holds float64 (2, 3); must be integers [B, T]"),
        (np.zeros(3, np.int32), "holds int32 (3,); must be integers"),
        (np.zeros((0, 3), np.int32), "must be integers"),
        (np.array([[0, 48]]), "holds ids 0..48; the vocabulary is 0..47"),
        (np.array([[-1, 3]]), "holds ids -1..3"),
        (np.zeros((1, 65), np.int32), "has rows of 65; the model takes 64 tokens"),
        (np.array([[Runs()]], object), "is no .npy file of token ids"),
    ],
)
def test_wrong_token_files(tmp_path, capsys, values, message):
    np.save(tmp_path / "tokens.npy", values, allow_pickle=True)
    with pytest.raises(ConfigError) as error:
        write_logits(
            {}, RouterBias(*np.zeros((2, 0, 8), np.float32)), tmp_path / "tokens.npy", tmp_path / "logits.npy", model(), Execution()
        )
    assert message in str(error.value) and capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


# --- a run that starts from given weights ---


def test_initial_weights_are_those_of_the_checkpoint(public):
    config = dataclasses.replace(SMALLER, init_from=str(public))
    free = dict(max_position_embeddings=32, aux_loss_alpha=0.5, initializer_range=0.3)
    check_initial(dataclasses.replace(config, model=dataclasses.replace(config.model, **free)))
    params, bias = load_initial(config, make_mesh(config.parallel.mesh))
    jax.tree.map(np.testing.assert_array_equal, (params, tuple(bias)), (parameters(config.model)[0], tuple(parameters(config.model)[1])))
    assert with_tokenizer_of(config).data.tokenizer == str(public / "tokenizer.json")
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="mine.json"))
    assert with_tokenizer_of(named) is named and with_tokenizer_of(MICRO) is MICRO


@pytest.mark.parametrize(
    ("field", "value", "theirs"), [("hidden_size", 32, 24), ("num_nextn_predict_layers", 1, 0), ("rope_theta", 5e5, 1e4)]
)
def test_initial_weights_of_another_architecture_are_refused(public, field, value, theirs):
    config = dataclasses.replace(SMALLER.model, **{field: value})
    with pytest.raises(ConfigError) as error:
        check_initial(dataclasses.replace(MICRO, model=config, init_from=str(public)))
    assert str(error.value) == f"config.model.{field} = {value!r}: {public} was made with {theirs!r}; give that value"


# --- chat templates and end tokens ---


def with_template(folder, template, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **settings}))
    return folder


def test_chat_template(tmp_path):
    folder = with_template(tmp_path, TEMPLATE, bos_token={"content": "<s>"})
    assert render_chat(folder, HELLO) == "<s><|user|>hello<|reply|>"
    with_template(folder, TEMPLATE, bos_token="<b>")
    assert render_chat(folder, HELLO) == "<b><|user|>hello<|reply|>"
    (folder / "chat_template.jinja").write_text("from the file: {{ messages[0]['content'] }}")
    assert render_chat(folder, HELLO) == "from the file: hello"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        (None, "there is no chat template beside the tokenizer"),
        ([{"name": "default", "template": "x"}], "there is no chat template beside the tokenizer"),
    ],
)
def test_a_template_that_fails_or_reaches_for_python_is_refused(tmp_path, template, message):
    with pytest.raises(ConfigError) as error:
        render_chat(with_template(tmp_path, template), HELLO)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_tokenizer_config_is_named(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        render_chat(tmp_path, HELLO)


def test_end_tokens(tmp_path):
    assert _eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert _eos_ids(tmp_path) == (1,)
    (tmp_path / "generation_config.json").write_text("{}")
    assert _eos_ids(tmp_path) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert _eos_ids(tmp_path) == (2, 3)
    for wrong, message in (('{"eos_token_id": "2"}', "eos_token_id in .*must be a token's id"), ("{", "cannot be read")):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=message):
            _eos_ids(tmp_path)
