"""Adapters to and from a stand-in hub on loopback; no network."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import jax
import numpy as np
import pytest
import yaml

from lora_jax import (
    LoraConfig,
    load_config,
    load_pretrained,
    model_card,
    open_adapter,
    push_to_hub,
    save_pretrained,
)
from lora_jax.core.errors import AdapterError, OutputError
from lora_jax.core.io import network
from parity_tests.peft.test_strict_files import CONFIG, WEIGHTS, planned, random_adapters

REPO = "me/ours"


class StandInHub(http.server.BaseHTTPRequestHandler):
    """The hub's calls for making a repository, committing small files and reading them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(f"POST {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        name, root = self.path.rpartition("/")[0], f"http://{self.headers['Host']}"
        if self.path in self.server.refused:
            self.reply(403, {"error": "you may not"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": f"{root}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif name == f"/api/models/{REPO}/preupload":
            files = json.loads(body)["files"]
            keep = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply(200, {"files": [{"path": file["path"]} | keep for file in files]})
        else:
            assert name == f"/api/models/{REPO}/commit", self.path
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            self.server.messages.append(lines[0]["summary"])
            new = {line["path"]: base64.b64decode(line["content"]) for line in lines[1:]}
            commit = f"{len(self.server.commits) + 1:040x}"
            newest = list(self.server.commits.values())[-1:]
            self.server.commits[commit] = (newest[0] if newest else {}) | new
            # The client reads HF_ENDPOINT when it is imported, and parses this address by it.
            url = f"{huggingface_hub.constants.ENDPOINT}/{REPO}/commit/{commit}"
            self.reply(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.seen.append(f"GET {self.path}")
        found = re.fullmatch(rf"/{REPO}/resolve/(\w+)/(.+)", self.path)
        if self.path == "/":
            return self.reply(200, {})
        newest = list(self.server.commits)[-1:]
        commit = newest[0] if found and newest and found[1] == "main" else found and found[1]
        files = self.server.commits.get(commit)
        if files is None or found[2] not in files:
            error = "EntryNotFound" if files is not None else "RepoNotFound"
            return self.reply(404, {}, {"X-Error-Code": error})
        content = files[found[2]]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.reply(200, content, {"ETag": etag, "X-Repo-Commit": commit})

    def reply(self, status, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty cache, a hub that refuses connections, and no variables of the developer's."""
    for name in ("LORA_JAX_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.commits, server.seen, server.created, server.messages = {}, [], [], []
    server.tokens, server.refused = set(), set()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        yield server
        server.shutdown()
    server.server_close()


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_is_pushed_is_what_is_loaded_and_saved(hub, tmp_path):
    found = planned()
    adapters = random_adapters(found)
    url = push_to_hub(REPO, found, adapters, base_model="org/base", task_type="CAUSAL_LM")
    (commit,) = hub.commits
    assert url.endswith(f"/{REPO}/commit/{commit}")
    config = dict(base_model="org/base", task_type="CAUSAL_LM")
    saved = save_pretrained(tmp_path / "a", found, adapters, **config)
    files = {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    card = model_card(found.config, REPO, **config)
    assert hub.commits[commit] == files | {"README.md": card.encode()}
    assert load_config(REPO) == found.config
    assert_same(load_pretrained(REPO, found), adapters)
    bare = open_adapter(REPO)
    assert bare[0].base_model == "org/base"
    assert_same(bare, open_adapter(saved))
    assert load_pretrained(REPO, found, strict=False)[1].problems == ()


def test_a_newer_push_is_seen_and_a_revision_is_kept(hub):
    found = planned()
    first, second = (random_adapters(found, seed) for seed in (1, 2))
    push_to_hub(REPO, found, first)
    assert_same(load_pretrained(REPO, found), first)
    push_to_hub(REPO, found, second, message="Better")
    assert hub.messages == ["Upload the adapter", "Better"]
    assert_same(load_pretrained(REPO, found), second)
    assert_same(load_pretrained(f"{REPO}@{min(hub.commits)}", found), first)


def test_both_files_are_of_one_commit(hub, monkeypatch):
    """A push between the two downloads changes neither."""
    found = planned()
    first, second = (random_adapters(found, seed) for seed in (1, 2))
    push_to_hub(REPO, found, first)
    download = huggingface_hub.hf_hub_download

    def and_then_a_push(repo, file, **options):
        path = download(repo, file, **options)
        if file == CONFIG and len(hub.commits) == 1:
            push_to_hub(REPO, found, second)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", and_then_a_push)
    assert_same(load_pretrained(REPO, found), first)
    assert len(hub.commits) == 2


def test_a_card_that_is_there_stays_unless_another_is_given(hub):
    found = planned()
    hub.commits["0" * 40] = {"README.md": b"mine"}
    push_to_hub(REPO, found, random_adapters(found))
    assert list(hub.commits.values())[-1]["README.md"] == b"mine"
    push_to_hub(REPO, found, random_adapters(found, 1), card="new")
    assert list(hub.commits.values())[-1]["README.md"] == b"new"


def test_privacy_and_token_reach_the_hub(hub):
    found = planned()
    push_to_hub(REPO, found, random_adapters(found), private=True, token="hf_secret")
    assert hub.created[0]["private"] is True and hub.tokens == {"Bearer hf_secret"}


def test_a_directory_wins_over_the_hub(hub, tmp_path):
    found = planned()
    push_to_hub(REPO, found, random_adapters(found, 1))
    save_pretrained(tmp_path / REPO, found, random_adapters(found, 2))
    hub.seen.clear()
    assert_same(load_pretrained(REPO, found), random_adapters(found, 2))
    assert hub.seen == []


def test_offline_reads_the_cache_and_refuses_to_push(hub, monkeypatch):
    found = planned()
    adapters = random_adapters(found)
    push_to_hub(REPO, found, adapters)
    load_pretrained(REPO, found)
    hub.seen.clear()
    for variable in ("LORA_JAX_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        assert_same(load_pretrained(REPO, found), adapters)
        with pytest.raises(AdapterError, match="no directory 'me/other' was found"):
            load_pretrained("me/other", found)
        with pytest.raises(OutputError, match=f"{variable} is set"):
            push_to_hub(REPO, found, adapters)
        monkeypatch.delenv(variable)
    assert hub.seen == []


def test_what_cannot_be_had_says_why(hub, monkeypatch):
    found = planned()
    with pytest.raises(AdapterError, match=r"no directory 'me/ours' was found, and http.*404"):
        load_pretrained(REPO, found)
    hub.commits["1" * 40] = {CONFIG: b"{}", "adapter_model.bin": b"pickle"}
    with pytest.raises(AdapterError, match=r"404.*adapter_model.safetensors; pickles are never"):
        load_pretrained(REPO, found)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match="cannot be reached.*HF_HUB_OFFLINE=1 reads the cache"):
        load_config(REPO)


def test_what_cannot_be_pushed_says_why_and_sends_nothing(hub, monkeypatch):
    found = planned()
    adapters = random_adapters(found)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, adapters)
    with pytest.raises(AdapterError, match="NaN"):
        push_to_hub(REPO, found, broken)
    with pytest.raises(OutputError, match="wanted user/repo"):
        push_to_hub("ours", found, adapters)
    assert hub.seen == []
    hub.refused.add("/api/repos/create")
    with pytest.raises(OutputError, match="cannot write to http.*/me/ours: .*you may not"):
        push_to_hub(REPO, found, adapters)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match="cannot be reached"):
        push_to_hub(REPO, found, adapters)
    assert hub.commits == {}


def test_an_upload_that_nobody_answers_is_said_and_given_up(hub, monkeypatch, caplog):
    found, over, answer = planned(), threading.Event(), StandInHub.do_POST

    def silent(self):
        if "/commit/" in self.path:
            over.wait(20)
        else:
            answer(self)

    monkeypatch.setattr(StandInHub, "do_POST", silent)
    quick = network.Limits(said=0.1, stalled=0.6, poll=0.05, slowest=1 << 20)
    monkeypatch.setattr(network, "LIMITS", quick)
    began = time.monotonic()
    said = r"sending [\d,]+ bytes to me/ours"
    try:
        with pytest.raises(OutputError, match=rf"{said}: given up after 1 s; look there whether"):
            push_to_hub(REPO, found, random_adapters(found))
    finally:
        over.set()
    assert time.monotonic() - began < 10 and hub.commits == {}
    assert re.search(rf"{said}: waiting for \d s\n", caplog.text)


def test_a_missing_client_fails_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = planned()
    install = r'pip install "lora_jax\[hub\]"'
    with pytest.raises(AdapterError, match=install):
        load_config(REPO)
    with pytest.raises(OutputError, match=install):
        push_to_hub(REPO, found, random_adapters(found))


@pytest.mark.parametrize(
    "name", ["nowhere", "./no/where", "/no/where", "../a/b", "a//b/c", "a b/c"]
)
def test_other_names_are_directories(name, hub):
    with pytest.raises(AdapterError, match="An adapter is a directory with"):
        load_config(name)
    assert hub.seen == []


CARDS = {
    "plain": {},
    "a name that needs quotes": dict(base_model='it\'s "odd": `|x`\n---'),
    "sequences": dict(base_model="org/base", task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_valid_yaml_and_its_code_compiles(name):
    card = model_card(LoraConfig(r=4, target_modules=["q"]), REPO, **CARDS[name])
    front = card.split("---\n")[1]
    fields = yaml.safe_load(front)
    base = CARDS[name].get("base_model")
    assert fields.get("base_model") == (base if base == "org/base" else None)
    assert fields["library_name"] == "peft" and "lora_jax" in fields["tags"]
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, name, "exec")
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card


SERVED = {
    "--max-lora-rank 16": dict(r=9),
    "--max-lora-rank 64": dict(r=8, rank_pattern={"q": 64}),
    "DoRA": dict(use_dora=True),
    "biases": dict(bias="all"),
    "whole modules": dict(modules_to_save=["head"]),
    "its rank 600": dict(r=600),
}


@pytest.mark.parametrize("words", SERVED)
def test_a_card_tells_how_vllm_serves_it_or_why_not(words):
    card = model_card(LoraConfig(**SERVED[words]), REPO, base_model="org/base")
    assert words in card
    assert ("vllm serve 'org/base' --enable-lora" in card) == words.startswith("--")
    assert ("merge it" in card) != words.startswith("--")
