"""A server in a thread, what a test asks of it, and a gate that holds up its engine."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.inference.engine import Engine
from dsv3_jax.training.stopping import StopSignal
from experiments.serving import lifetime


class Gate:
    """Holds up the engine between steps: while `open` is not set, and `pause` seconds a step."""

    def __init__(self, monkeypatch):
        self.open, self.pause, step = threading.Event(), 0.0, Engine.step
        self.open.set()

        def held(engine):
            self.open.wait()
            time.sleep(self.pause)
            return step(engine)

        monkeypatch.setattr(Engine, "step", held)


@dataclasses.dataclass
class Server:
    """A running server; `failure` has what it ended with."""

    url: str
    stop: StopSignal
    thread: threading.Thread
    failure: list[BaseException]

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path="/v1/completions", **body):
        return httpx.post(self.url + path, json=body, timeout=60)

    def figures(self):
        """Metrics by name and outcome."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return {(s.name.removeprefix("dsv3_jax_"), s.labels.get("outcome")): s.value for f in families for s in f.samples}

    def wait_for(self, name, outcome, value):
        until(lambda: self.figures().get((name, outcome)) == value)


def until(condition):
    """Waits for a condition."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def serving(run, gate=None, **settings):
    """A server in a thread, warmed up; it is stopped at the end, and must end."""
    bound, stop, failure = lifetime.bind("127.0.0.1", 0), StopSignal(), []
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that a client that does not read is soon noticed

    def main():
        try:
            asyncio.run(lifetime.serve(run, lifetime.Settings(**{"name": "micro", "rows": 2, **settings}), bound, stop))
        except Exception as error:
            failure.append(error)

    server = Server(lifetime.url(bound), stop, threading.Thread(target=main), failure)
    server.thread.start()
    try:
        until(lambda: health(server.url) == (200, "ready"))
        yield server
    finally:
        if gate:
            gate.open.set()
        stop.received = True
        server.thread.join(60)
        assert not server.thread.is_alive()


def health(url):
    """Status and state, or None where nobody listens, or answers yet."""
    try:
        answer = httpx.get(f"{url}/health")
    except httpx.TransportError:
        return None
    return answer.status_code, answer.json()["status"]
