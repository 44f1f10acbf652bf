"""experiments.serve over loopback, with the public `openai` client and with clients that misbehave."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from dsv3_jax.config import ConfigError, from_config_dict
from dsv3_jax.inference.chat import encode_chat
from dsv3_jax.inference.engine import Engine, EngineSettings
from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.run import Run
from dsv3_jax.training.stopping import StopSignal
from dsv3_jax.training.tokenizer import train_tokenizer
from experiments.serving import lifetime
from experiments.serving.app import Limits, _Generation
from experiments.serving.calls import Call, Served
from experiments.serving.worker import Job, Ticket
from tests import micro_config
from tests.interop.folders import write_random
from tests.served import Gate, health, serving, until
from tests.small import agreeing, parameters
from tests.test_cli import ROOT

MICRO = from_config_dict(micro_config.get_config())
# One MoE layer compiles in half the time.
CONFIG = dataclasses.replace(MICRO, model=dataclasses.replace(MICRO.model, first_k_dense_replace=0, num_hidden_layers=1))
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|reply|>"
HELLO = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
PROMPT = "def read("


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random model, whose text is full of bytes that are no characters, opened as a run is."""
    folder = tmp_path_factory.mktemp("serve") / "micro"
    folder.mkdir()
    train_tokenizer([(ROOT / "README.md").read_text()], 300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|eos|>", "chat_template": TEMPLATE}))
    return Run(folder, CONFIG, Execution.of(CONFIG, 0), *parameters(CONFIG.model), None, (0,))


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture(scope="module")
def server(run):
    with serving(run, max_body=5000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def greedy_ids(run, prompt, count):
    """What the engine says after a prompt, without a server."""
    engine = Engine(run.params, run.router_bias, run.config.model, run.execution, EngineSettings(rows=2, pages=3))
    engine.submit(prompt, count)
    ids = []
    while not engine.idle:
        ids += [new.token for new in engine.step()]
    return ids


def greedy(run, prompt, count):
    """The text of it."""
    return run.tokenizer.decode(greedy_ids(run, prompt, count), skip_special_tokens=False)


def test_completion_is_the_engines_greedy_text_in_pieces_too(run, client, gate):
    gate.pause = 0.01  # else tokens that come while one is on its way are sent together
    prompt = run.tokenizer.encode(PROMPT).ids
    expected = greedy(run, prompt, 40)
    asked = {"model": "micro", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked, user="me")
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (len(prompt), 40, len(prompt) + 40)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    pieces = [chunk.choices[0].text for chunk in chunks[:-1]]
    assert "".join(pieces) == expected and len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(pieces) - 1) + ["length"]
    assert client.completions.create(**asked | {"prompt": [prompt]}).choices[0].text == expected


def test_chat_is_a_completion_of_the_template(run, client):
    prompt = encode_chat(run.folder, run.tokenizer, HELLO)
    chat = client.chat.completions.create(model="micro", messages=HELLO, temperature=0)
    expected = greedy(run, prompt, 64 - len(prompt))  # all that fits
    assert (chat.choices[0].message.content, chat.choices[0].message.role) == (expected, "assistant")
    stream = client.chat.completions.create(model="micro", messages=HELLO, temperature=0, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == expected


def test_a_stop_string_ends_the_text_before_it(run, client, server, gate):
    gate.pause = 0.01
    text = greedy(run, run.tokenizer.encode(PROMPT).ids, 40)
    asked = {"model": "micro", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": ["never said", text[9:14]]}
    whole = client.completions.create(**asked)
    assert server.figures()["running_rows", None] == 0  # not when the other tokens would have come
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[: text.index(text[9:14])], "stop")
    assert whole.usage.completion_tokens < 40
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == whole.choices[0].text


def test_an_end_token_ends_the_text_and_is_no_part_of_it(run):
    prompt = run.tokenizer.encode(PROMPT).ids
    ids = greedy_ids(run, prompt, 40)
    place = ids.index(ids[8])
    with serving(run._replace(eos_ids=(299, ids[8]))) as server:
        answer = server.post(model="micro", prompt=PROMPT, max_tokens=40, temperature=0).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (run.tokenizer.decode(ids[:place], skip_special_tokens=False), "stop")
    assert answer["usage"]["completion_tokens"] == place + 1


def test_requests_at_once_are_as_alone_and_a_seed_repeats_its_text(client):
    def ask(seed):
        return client.completions.create(model="micro", prompt=PROMPT, max_tokens=20, seed=seed).choices[0].text

    alone = [ask(seed) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
    assert len(set(alone)) == 6


def test_models(client):
    assert [model.id for model in client.models.list()] == ["micro"]
    assert client.models.retrieve("micro").owned_by == "dsv3_jax"
    with pytest.raises(openai.NotFoundError, match="this server has 'micro'"):
        client.models.retrieve("macro")


@pytest.mark.parametrize(
    ("body", "status", "field", "part"),
    [
        ("{", 400, None, "not valid JSON"),
        ("[1]", 400, None, "must be a JSON object"),
        ("[" * 4000, 400, None, "not valid JSON"),
        (b"\xff", 400, None, "not valid JSON"),
        (r'{"model": "\ud800"}', 400, None, "not valid JSON"),
        ('{"prompt": "' + "x" * 6000 + '"}', 413, None, "--max_body is 5000"),
        ({"model": None}, 400, "model", "is missing"),
        ({"model": "macro"}, 404, "model", "this server has 'micro'"),
        ({"prompt": None}, 400, "prompt", "must be a text"),
        ({"prompt": 3}, 400, "prompt", "must be a text"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "must be a text"),
        ({"prompt": [1, 300]}, 400, "prompt", "ids below 300"),
        ({"prompt": [True]}, 400, "prompt", "ids below 300"),
        ({"prompt": ""}, 400, "prompt", "a prompt of 0 tokens"),
        ({"prompt": [7] * 60}, 400, "prompt", "together they are at most 64"),
        ({"prompt": [7] * 600}, 400, "prompt", "together they are at most 64"),
        ({"max_tokens": 0}, 400, "max_tokens", "whole number from 1"),
        ({"max_tokens": "9"}, 400, "max_tokens", "whole number from 1"),
        ({"max_tokens": True}, 400, "max_tokens", "whole number from 1"),
        ({"max_tokens": 64}, 400, "prompt", "together they are at most 64"),
        ({"temperature": -1}, 400, "temperature", "from 0 to 2"),
        ({"temperature": float("nan")}, 400, "temperature", "from 0 to 2"),
        ({"top_p": 1.5}, 400, "top_p", "from 0 to 1"),
        ({"seed": 1.5}, 400, "seed", "whole number"),
        ({"stop": ["a", ""]}, 400, "stop", "up to 4"),
        ({"stop": ["a"] * 5}, 400, "stop", "up to 4"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "is for stream"),
        ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options", "include_usage"),
        ({"n": 2}, 400, "n", "not supported"),
        ({"logprobs": 0}, 400, "logprobs", "not supported"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
        ({"messages": HELLO}, 400, "messages", "a field of the other endpoint"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options", "include_usage"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_in_one_line(server, body, status, field, part):
    asked = body if isinstance(body, str | bytes) else json.dumps({"model": "micro", "prompt": PROMPT, "max_tokens": 9} | body)
    answer = httpx.post(f"{server.url}/v1/completions", content=asked, headers={"Content-Type": "application/json"})
    assert_refused(answer, status, field, part)


def assert_refused(answer, status, field, part):
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field) and part in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_two_limits_that_differ_are_refused(server):
    asked = {"model": "micro", "messages": HELLO, "max_tokens": 20}
    assert_refused(server.post("/v1/chat/completions", **asked, max_completion_tokens=3), 400, "max_completion_tokens", "give one of them")
    answer = server.post("/v1/chat/completions", **asked | {"max_tokens": 3}, max_completion_tokens=3)
    assert answer.json()["usage"]["completion_tokens"] <= 3


def test_text_that_comes_while_a_send_waits_is_sent():
    """The job ends while the first piece of its stream is on its way."""
    job, messages = Job([1], 3, 0.0, 1.0, 0, ()), []
    served = Served("micro", ROOT, None, 300, 64)

    async def main():
        ticket = Ticket(job)
        ticket.put("a", 1, None)

        async def send(message):
            if not messages:
                ticket.put("b", 1, None)
                ticket.put("c", 1, "length")
            messages.append(message)

        deadline = asyncio.get_running_loop().time() + 5
        await _Generation(False, None, served, None, Limits(5.0, 100))._stream(Call(job, True, False), ticket, deadline, None, send)

    asyncio.run(main())
    lines = b"".join(message.get("body", b"") for message in messages).decode().split("\n\n")
    choices = [choice for line in lines if "choices" in line for choice in json.loads(line.removeprefix("data: "))["choices"]]
    assert "".join(choice["text"] for choice in choices) == "abc"
    assert [choice["finish_reason"] for choice in choices][-1] == "length"


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [3], [{"role": "tool", "content": "x"}], [{"role": "user", "content": None}], [{**HELLO[0], "name": "me"}],
     [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], [{"role": "user", "content": [{"type": "text", "text": 1}]}]],
)  # fmt: skip
def test_messages_that_the_template_could_pass_over_are_refused(server, messages):
    assert_refused(server.post("/v1/chat/completions", model="micro", messages=messages), 400, "messages", "messages")


def test_neutral_values_and_labels_are_accepted(server):
    neutral = {"n": 1, "logprobs": None, "presence_penalty": 0, "logit_bias": {}, "metadata": {"a": "b"}, "stop": None, "echo": False}
    assert server.post(model="micro", prompt=PROMPT, max_tokens=1, **neutral).status_code == 200
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    limits = {"max_completion_tokens": 2, "temperature": 0}
    answers = [server.post("/v1/chat/completions", model="micro", messages=m, **limits) for m in (parts, HELLO[1:])]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_other_paths_methods_and_types_are_refused_in_the_same_shape(server):
    assert_refused(httpx.get(f"{server.url}/v2"), 404, None, "GET /v2")
    got = httpx.get(f"{server.url}/v1/completions")
    assert_refused(got, 405, None, "not allowed")
    assert got.headers["allow"] == "POST"
    assert_refused(httpx.post(f"{server.url}/v1/completions", content="{}"), 415, None, "application/json")


def test_metrics_count_how_requests_end_and_their_tokens(run):
    with serving(run) as server:
        prompt = len(run.tokenizer.encode(PROMPT).ids)
        assert server.post(model="micro", prompt=PROMPT, max_tokens=7, temperature=0).status_code == 200
        assert server.post(model="micro", prompt=PROMPT, max_tokens=0).status_code == 400
        server.wait_for("requests_total", "completed", 1)
        figures = server.figures()
    expected = {
        ("requests_total", "invalid"): 1, ("prompt_tokens_total", None): prompt, ("generated_tokens_total", None): 7,
        ("time_to_first_token_seconds_count", None): 1, ("inter_token_seconds_count", None): 6,
        ("waiting_requests", None): 0, ("running_rows", None): 0,
    }  # fmt: skip
    assert {key: figures[key] for key in expected} == expected


def test_drafts_change_no_greedy_text_and_are_counted(run, gate):
    run = run._replace(params=agreeing(CONFIG.model)[0])
    expected = greedy(run, run.tokenizer.encode(PROMPT).ids, 40)
    asked = {"model": "micro", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    with serving(run, drafts=1) as server:
        assert server.figures()["drafted_tokens_total", None] == 0  # those of the warm-up are nobody's
        gate.pause, started = 0.02, time.monotonic()
        assert server.client().completions.create(**asked).choices[0].text == expected
        figures, elapsed = server.figures(), time.monotonic() - started
        drafted, accepted = (figures[f"{name}_tokens_total", None] for name in ("drafted", "accepted"))
        assert 0 < accepted < drafted and drafted + accepted in (39, 40)  # a round's last token may be one too many
        assert figures["generated_tokens_total", None] == 40 and figures["inter_token_seconds_count", None] == 39
        assert figures["inter_token_seconds_sum", None] < elapsed  # tokens of a round share its time
        stop = expected[9:14]
        stopped = server.client().completions.create(**asked, stop=stop)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (expected[: expected.index(stop)], "stop")


def test_a_full_queue_gives_429_and_says_when_to_retry(run, gate):
    with serving(run, gate, max_queue=1) as server, concurrent.futures.ThreadPoolExecutor(3) as pool:
        gate.open.clear()
        asked = {"model": "micro", "prompt": PROMPT, "max_tokens": 2}
        accepted = [pool.submit(server.client().completions.create, **asked) for _ in range(3)]  # two rows and one that waits
        until(lambda: sum(server.figures()[name, None] for name in ("waiting_requests", "running_rows")) == 3)
        with pytest.raises(openai.RateLimitError) as error:
            server.client().completions.create(**asked)
        assert error.value.response.headers["retry-after"] == "1" and error.value.code == "queue_full"
        gate.open.set()
        assert all(one.result().usage.completion_tokens == 2 for one in accepted)
        server.wait_for("requests_total", "full", 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(run, gate, stream):
    with serving(run, gate) as server:
        gate.pause = 0.05
        body = {"model": "micro", "prompt": PROMPT, "max_tokens": 50, "temperature": 0, "stream": stream}
        leaving = httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.3)
        with contextlib.suppress(httpx.ReadTimeout), leaving as answer:
            next(answer.iter_lines())
        server.wait_for("requests_total", "disconnected", 1)
        server.wait_for("running_rows", None, 0)
        assert server.figures()["generated_tokens_total", None] < 50


def test_slow_clients_are_dropped_and_hold_up_nobody(run, gate):
    gate.pause = 0.01  # else tokens are sent together, in few pieces
    name = "m" * 40_000  # each piece of a stream has it, so an unread answer fills all buffers
    with serving(run, gate, name=name, timeout=5.0) as server:
        address = server.url.removeprefix("http://").split(":")
        body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": 55, "temperature": 0, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.socket() as deaf, socket.socket() as sluggish, socket.socket() as silent:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for one, sent in ((deaf, head + body), (sluggish, head + body[:20]), (silent, head[:20])):
                one.connect((address[0], int(address[1])))
                one.sendall(sent)
            server.wait_for("generated_tokens_total", None, 55)  # though nobody reads them
            assert server.post(model=name, prompt=PROMPT, max_tokens=2).status_code == 200
            assert sluggish.recv(100).startswith(b"HTTP/1.1 408 ")
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(100) == b""
            server.wait_for("requests_total", "disconnected", 1)


def test_a_request_that_takes_too_long_is_told_so_and_frees_its_row(run, gate):
    with serving(run, gate, timeout=0.5) as server:
        gate.open.clear()
        with pytest.raises(openai.InternalServerError) as error:
            server.client().completions.create(model="micro", prompt=PROMPT, stream=True)
        assert error.value.status_code == 504 and "--timeout" in error.value.message
        gate.open.set()
        gate.pause = 0.05
        with pytest.raises(openai.APIError, match="--timeout"):  # the stream has begun: the error is an event of it
            list(server.client().completions.create(model="micro", prompt=PROMPT, max_tokens=50, temperature=0, stream=True))
        server.wait_for("running_rows", None, 0)


def test_told_to_stop_it_refuses_new_requests_and_finishes_the_running_one(run, gate):
    asked = {"model": "micro", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    with serving(run, gate) as server:
        text = server.client().completions.create(**asked).choices[0].text
        gate.open.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.client().completions.create, **asked)
            until(lambda: server.figures()["waiting_requests", None] + server.figures()["running_rows", None] == 1)
            server.stop.received = True
            until(lambda: health(server.url) == (503, "shutting down"))
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                server.client().completions.create(**asked)
            gate.open.set()
            assert running.result().choices[0].text == text
        server.thread.join(60)
        assert health(server.url) is None and not server.failure


def test_what_outlasts_the_grace_is_told_so(run, gate):
    with serving(run, gate, grace=0.2) as server:
        gate.open.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.client().completions.create, model="micro", prompt=PROMPT)
            until(lambda: server.figures()["waiting_requests", None] + server.figures()["running_rows", None] == 1)
            server.stop.received = True
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                running.result()


def test_an_engine_that_fails_ends_the_server_with_its_error(run, monkeypatch):
    with serving(run) as server:
        monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the server has failed"):
            server.client().completions.create(model="micro", prompt=PROMPT)
        server.thread.join(60)
        assert [type(error) for error in server.failure] == [ZeroDivisionError]


def test_addresses_contexts_and_drafts_that_cannot_be_used(run):
    taken, used = lifetime.bind("127.0.0.1", 0), r"--port = \d+: cannot be used at 127.0.0.1: .*choose another"
    with contextlib.closing(taken), pytest.raises(ConfigError, match=used):
        lifetime.bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match=r"--host = 'no.such.host.invalid': is no address"):
        lifetime.bind("no.such.host.invalid", 0)
    with pytest.raises(ConfigError, match=r"--host = 'x\.\.y': is no address"):
        lifetime.bind("x..y", 0)
    with pytest.raises(ConfigError, match="--context = 65: the model takes 64 tokens"):
        asyncio.run(lifetime.serve(run, lifetime.Settings(context=65), lifetime.bind("127.0.0.1", 0), StopSignal()))
    with pytest.raises(ConfigError, match="--speculative = 1: this model has no MTP modules"):
        run = run._replace(config=dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_nextn_predict_layers=0)))
        asyncio.run(lifetime.serve(run, lifetime.Settings(drafts=1), lifetime.bind("127.0.0.1", 0), StopSignal()))


@pytest.mark.slow
def test_the_command_serves_a_public_folder_and_ends_with_status_0_on_sigterm(run, tmp_path):
    folder = write_random(tmp_path / "public", CONFIG.model)
    for file in run.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "experiments.serve", f"--hf={folder}", "--port=0", "--rows=2", "--speculative=1", "--fp8_cache"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split(" at ")[1].split("/v1")[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=240)
        stream = client.chat.completions.create(model="public", messages=HELLO, stream=True)  # waits until all is compiled
        next(stream)
        process.terminate()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
