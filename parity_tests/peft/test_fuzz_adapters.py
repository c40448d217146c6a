"""Mutated adapter files: refused with an error of ours, or read as another reader reads them.

``reference`` is that reader: numpy and the file format's text alone, nothing of lora_jax's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import signal
import struct
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import LoraConfig, load_config, load_pretrained, open_adapter, plan, save_pretrained
from lora_jax.core.config import endless_regexes
from lora_jax.core.errors import LoraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHAPES = {"layers.0.q": (3, 4), "layers.1.v": (4, 2)}
PREFIX = "base_model.model."
SECONDS = 20


def model(params, x):
    for weight in params.values():
        x = jnp.tanh(x @ weight["weight"])
    return x


PARAMS = {name: {"weight": jnp.ones(shape)} for name, shape in SHAPES.items()}
FIXED = LoraConfig(r=2, lora_alpha=3, target_modules=["q", "v"], alpha_pattern={"v": 5})


def planned(config):
    return plan(model, PARAMS, config, jnp.ones((2, 3)))


class Refused(Exception):
    """The reference reader finds the file wrong."""


# --- the independent reader ---

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def need(condition, why):
    if not condition:
        raise Refused(why)


def once(pairs):
    need(len(pairs) == len(dict(pairs)), "a name twice")
    return dict(pairs)


def read_json(content):
    return json.loads(content.decode(), object_pairs_hook=once)


def reference_tensors(content):
    (length,) = struct.unpack("<Q", content[:8])
    header, data = read_json(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    end, tensors = 0, {}
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(DTYPES[said["dtype"]]), said["shape"]
        start, stop = said["data_offsets"]
        need(start == end and stop - start == math.prod(shape) * dtype.itemsize, "offsets")
        tensors[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
        end = stop
    need(end == len(data), "bytes that belong to no tensor")
    return tensors


def means(names, module):
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def first(patterns, module, default):
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def reference(config, weights):
    """Return ``{module: (A, B, scale)}``, or raise Refused for what no reader may accept."""
    fields, tensors = read_json(config), reference_tensors(weights)
    need(fields["peft_type"] == "LORA" and not fields.get("use_dora"), "another method")
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    halves = {f"{PREFIX}{module}.lora_{half}.weight" for module in modules for half in "AB"}
    need(halves == set(tensors), "not two halves of every module")
    found = {}
    for module in modules:
        a, b = (tensors[f"{PREFIX}{module}.lora_{half}.weight"] for half in "AB")
        r = first(fields.get("rank_pattern") or {}, module, fields.get("r", 8))
        alpha = first(fields.get("alpha_pattern") or {}, module, fields.get("lora_alpha", 8))
        need(a.shape[0] == r == b.shape[1], "the rank is not the configuration's")
        for half in (a, b):
            need(half.dtype != np.float64, "JAX has no such dtype")
            need(np.isfinite(half.astype(np.float64)).all(), "not finite")
        targets, layers = fields.get("target_modules"), fields.get("layers_to_transform")
        if targets not in (None, "all-linear"):
            need(means(targets, module), "not a target")
            need(not means(fields.get("exclude_modules") or [], module), "excluded")
            if layers not in (None, []):
                number = int(re.search(r"\.(\d+)\.", module)[1])
                need(number in ([layers] if isinstance(layers, int) else layers), "layer")
            if not isinstance(targets, str):
                need(all(any(means([t], m) for m in modules) for t in targets), "idle target")
        root = math.sqrt(r) if fields.get("use_rslora") else r
        found[module] = (a.T, b.T, alpha / root)
    return found


# --- mutations ---

# Eight ways to read each letter: it would take Python's re hours.
HANGS = "((.|.|.|.|.|.|.|.)+)+!"

VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 1.5, 1e308, 2**31, 2**63, 2**64, 10**30, "", "q", "v"),
    *([], {}, ["q"], ["v"], ["q", "v", "k"], [1], [0, 1], {"q": 3}, {"v": 1, "q": 2}),
    *({"(?i)q": 2}, {"q(": 2}, {".*": 2}, ".*", "(q|v", r".*\.(q|v)", "all-linear", "none", "all"),
    *("lora_only", "gaussian", "pissa", "IA3", "é", "\x00", [["q"]], {"q": None}, [[], {}]),
    *(HANGS, {HANGS: 2}),
]
DTYPE_NAMES = [*DTYPES, "I32", "I64", "U8", "BOOL", "F4", "C64", "f32", ""]


def flip(rng, content, config):
    out = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flip_in_the_data(rng, content, config):
    start = len(content) if config else 8 + struct.unpack("<Q", content[:8])[0]
    return content[:start] + flip(rng, content[start:] or b" ", config)


def poison(rng, content, config):
    """Put NaN or infinity in the place of numbers; every half of these bytes is one, too."""
    if config:
        return content.replace(b"3", pick(rng, [b"NaN", b"Infinity", b"1e999"]), 1)
    start = 8 + struct.unpack("<Q", content[:8])[0]
    place = start + 4 * int(rng.integers((len(content) - start) // 4))
    return content[:place] + pick(rng, [b"\xff\xff" * 2, b"\x80\x7f" * 2]) + content[place + 4 :]


def cut(rng, content, config):
    return content[: rng.integers(len(content))]


def splice(rng, content, config):
    one, two, three = sorted(rng.integers(len(content), size=3))
    return content[:one] + content[two:three] + content[one:]


def overwrite(rng, content, config):
    place = rng.integers(len(content))
    return content[:place] + rng.bytes(int(rng.integers(1, 9))) + content[place + 1 :]


def claim(rng, content, config):
    power = int(rng.integers(64))
    return struct.pack("<Q", 2**power - int(rng.integers(2))) + content[8:]


def edit(rng, content, config):
    """Change one value, drop, rename or repeat one name, anywhere in the JSON; repack it."""
    length = 0 if config else struct.unpack("<Q", content[:8])[0]
    text, rest = (content, b"") if config else (content[8 : 8 + length], content[8 + length :])
    fields = json.loads(text)
    for _ in range(rng.integers(1, 3)):
        edit_one(rng, fields)
    text = json.dumps(fields)
    if rng.random() < 0.1:
        name = pick(rng, list(fields) or ["r"])
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(pick(rng, VALUES))}}}"
    text = text.encode()
    return text if config else struct.pack("<Q", len(text)) + text + rest


def edit_one(rng, fields):
    if not fields:
        return
    name = pick(rng, sorted(fields))
    inner = fields[name]
    choice = rng.integers(8)
    if isinstance(inner, dict) and "dtype" in inner and choice < 5:
        edit_tensor(rng, fields, name)
    elif choice == 5:
        del fields[name]
    elif choice == 6:
        fields[name + "x"] = fields.pop(name)
    elif choice == 7:
        other = pick(rng, sorted(fields))
        fields[name], fields[other] = fields[other], fields[name]
    else:
        fields[name] = pick(rng, VALUES)


def edit_tensor(rng, fields, name):
    said = fields[name]
    key = pick(rng, sorted(said))
    if key == "dtype":
        said[key] = pick(rng, DTYPE_NAMES)
    elif rng.random() < 0.4:
        said[key] = said[key][::-1]
    else:
        said[key] = [pick(rng, [n, n, n + 1, 0, 2**31, 2**62, 2**64, -1]) for n in said[key]]
    if rng.random() < 0.3:  # a consistent file of another dtype
        said |= {"dtype": "F16", "shape": [2 * said["shape"][0], *said["shape"][1:]]}


def pick(rng, values):
    return values[rng.integers(len(values))]


MUTATIONS = [flip, flip_in_the_data, poison, cut, splice, overwrite, edit, edit, edit, claim]


def mutate(rng, files):
    """Return the files with one of them changed, or both, and how."""
    files, done = dict(files), []
    for name in pick(rng, [[CONFIG], [WEIGHTS], [WEIGHTS], [CONFIG, WEIGHTS]]):
        change = pick(rng, MUTATIONS[:-1] if name == CONFIG else MUTATIONS)
        files[name] = change(rng, files[name], name == CONFIG)
        done.append(f"{change.__name__} {name}")
    return files, ", ".join(done)


# --- the check ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Whole files to mutate, a directory to write to, and the plans made so far."""
    directory = tmp_path_factory.mktemp("fuzz")
    seeds = []
    rng = np.random.default_rng(7)
    for n, dtype in enumerate([jnp.float32, jnp.bfloat16, jnp.float16]):
        found = planned(FIXED)
        adapters = jax.tree.map(
            lambda leaf, to=dtype: jnp.asarray(rng.normal(size=leaf.shape), to), found.abstract()
        )
        saved = save_pretrained(directory / str(n), found, adapters)
        seeds.append({name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    (directory / "mutated").mkdir()
    return seeds, directory / "mutated", {repr(FIXED): planned(FIXED)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endless_regexes, "SECONDS", 1.0)


@contextlib.contextmanager
def watched():
    """Fail where one file takes longer than any may."""

    def late(*_):
        raise TimeoutError(f"one file took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def by_the_fixed_plan(directory, plans):
    return load_pretrained(directory, plans[repr(FIXED)])


def by_its_own_plan(directory, plans):
    config = load_config(directory)
    if repr(config) not in plans:
        plans[repr(config)] = planned(config)
    return load_pretrained(directory, plans[repr(config)])


def bare(directory, plans):
    return open_adapter(directory)[1]


def check(files, directory, plans):
    """Return how many readers took the file; fail unless each refused it or read it rightly."""
    for name, content in files.items():
        (directory / name).unlink(missing_ok=True)  # cutting a file short waits for the disk
        (directory / name).write_bytes(content)
    taken = 0
    for read in (by_the_fixed_plan, by_its_own_plan, bare):
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer fields
                adapters = read(directory, plans)
        except LoraError as error:
            assert str(error)
            continue
        taken += 1
        assert_equal(adapters, reference(files[CONFIG], files[WEIGHTS]))
    return taken


def assert_equal(adapters, wanted):
    got = {name.removesuffix(".weight"): one for name, one in adapters.items()}
    assert got.keys() == wanted.keys()
    for name, (a, b, scale) in wanted.items():
        one = got[name]
        assert one.a.dtype == a.dtype and one.b.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(one.a, np.float64), a.astype(np.float64))
        np.testing.assert_array_equal(np.asarray(one.b, np.float64), b.astype(np.float64))
        assert one.scale == scale


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_seeded_corpus_is_refused_or_read_rightly(count, corpus):
    seeds, directory, plans = corpus
    before, taken = memory(), Counter()
    for n in range(count):
        files, how = mutate(np.random.default_rng(n), seeds[n % len(seeds)])
        try:
            taken[check(files, directory, plans) > 0] += 1
        except BaseException as error:  # a crash of a native reader is no Exception
            raise AssertionError(f"file {n}: {how}: {type(error).__name__}: {error}") from error
    assert taken[True] > count / 20, "vacuous: too few files are read"
    assert taken[False] > count / 2, "vacuous: too few files are refused"
    assert memory() - before < 2**28


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_are_refused_or_read_rightly(corpus, data):
    """Hypothesis cuts, replaces and inserts; it shrinks what it finds."""
    seeds, directory, plans = corpus
    files = dict(data.draw(st.sampled_from(seeds)))
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = files[name]
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(start + 8, len(content))))
    files[name] = content[:start] + data.draw(st.binary(max_size=8)) + content[stop:]
    check(files, directory, plans)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": HANGS},
        {"exclude_modules": HANGS},
        {"rank_pattern": {HANGS: 2}},
        {"alpha_pattern": {"v": 5, HANGS: 2}},
        {"layers_to_transform": [0], "layers_pattern": [HANGS]},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_a_pattern_that_hangs_is_refused(fields, corpus):
    seeds, directory, plans = corpus
    changed = json.dumps(json.loads(seeds[0][CONFIG]) | fields).encode()
    assert check(seeds[0] | {CONFIG: changed}, directory, plans) == 0


@pytest.mark.parametrize("n", range(3))
def test_whole_files_are_taken_by_every_reader(n, corpus):
    seeds, directory, plans = corpus
    assert check(seeds[n], directory, plans) == 3
