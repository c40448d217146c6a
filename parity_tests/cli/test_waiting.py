"""Every wait for a server has a limit, and says what is waited for and what was answered."""

import http.server
import logging
import socket
import threading
import time

import huggingface_hub.constants
import pytest

from lora_jax import load_config
from lora_jax.core.errors import AdapterError, AssetError
from lora_jax.core.io import hub_endpoint, network
from lora_jax.core.io.network import Limits, within
from lora_jax.models import assets

QUICK = Limits(said=0.1, stalled=0.6, least=1000, poll=0.05)


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers the first request, which asks whether anybody is there, and then as it is told."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        if self.path == "/" and self.server.kind != "silent from the start":
            self.answer(200)
        else:
            getattr(self, self.server.kind.split()[0])()

    do_GET = do_HEAD

    def answer(self, status, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def silent(self):
        self.server.over.wait(20)

    def drip(self):
        while not self.server.over.wait(0.05):
            self.wfile.write(b"H")

    def later(self):
        self.answer(429, Retry_After="86400")

    def forbidden(self):
        self.answer(403)

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("LORA_JAX_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(network, "LIMITS", QUICK)
    # The threads that are left behind outlive the test, and would write into others.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    monkeypatch.setattr(hub_endpoint, "_PROBE_SECONDS", 0.3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.daemon_threads, server.over = True, threading.Event()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


KINDS = {
    "silent": "given up after",
    "drip": "given up after",
    "silent from the start": "cannot be reached: ",
    "later": "429|given up after",
    "forbidden": "403",
}


def test_a_server_that_keeps_waiting_is_given_up(server):
    for kind, said in KINDS.items():
        server.kind = kind
        lines = []
        start = time.monotonic()
        with pytest.raises(AssetError, match=said) as caught:
            assets.resolve_model("some/model", progress=lines.append)
        assert hub_endpoint.endpoint() in str(caught.value)
        with pytest.raises(AdapterError, match=said):
            load_config("some/adapter")
        assert time.monotonic() - start < 60
        if kind in ("silent", "drip"):
            assert any("some/model: waiting for " in line for line in lines), lines


def test_what_keeps_coming_is_waited_for():
    there = 0

    def arrived():
        nonlocal there
        there += QUICK.least
        return there

    lines, over = [], threading.Event()
    threading.Timer(1.5, over.set).start()
    assert within(over.wait, "it", arrived=arrived, say=lines.append, limits=QUICK) is True
    assert lines and all(line.startswith("it: waiting for ") for line in lines)


def test_what_fails_fails_as_it_does():
    def broken():
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        within(broken, "it")


def test_an_index_that_hangs_is_said_and_its_process_is_ended(server, monkeypatch, tmp_path):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        lines = []
        with pytest.raises(AssetError, match="pip download tiny-asset==9: given up after"):
            assets._pip_download("tiny-asset==9", tmp_path, lines.append)
    assert any("pip download tiny-asset==9: waiting for" in line for line in lines)


def test_the_status_is_named_where_a_client_keeps_it_to_itself():
    class Answer:
        status_code = 429

    inner = OSError("busy")
    inner.response = Answer()
    outer = ValueError("not in the cache")
    outer.__cause__ = inner
    assert network.failure(outer) == "HTTP status 429: not in the cache"
    assert network.failure(ValueError("a\nb")) == "a b"
