"""Regular expressions that never come to an end are refused; others start no process."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import time

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import LoraConfig, plan
from lora_jax.core.config import endless_regexes
from lora_jax.core.config import lora_config as config
from lora_jax.core.errors import PlanError

NAME = "model.layers.0.self_attention.query_projection"
PARAMS = {NAME: {"weight": jnp.ones((3, 4))}}

# (pattern, whether in brackets in another expression it is still one)
HANGING = [
    r"([a-z._0-9]+)+!",
    r"((?:\w|\.)*)*!",
    r"(.|[a-z])+!",
    r"(\w?.?)+!",
    r"(.*_){2,}(.*_)+!",
    r"(?P<x>.+)+!",
    r"(?:.+(?#why))+!",
    r"(.{1,9}){1,99}!",
    r"(?>x)?(.+)+?!",
    ".?" * 40 + r"[.\w]" * 40 + "!",
    r".*.*.*.*.*.*.*.*.*!",
    "(.|.)" * 40 + "!",
]

COMMON = [
    r".*\.(q|v)_proj",
    r"(.*\.)?layers\.(\d+)\..*",
    r".*\.(0|1|2|10|11)\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    r"^(?!.*vision).*(?:q_proj|k_proj|v_proj|up_proj|gate_proj|down_proj).*",
    r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\..*_proj$",
    r"(?=.*encoder)(?!.*lm_head).*\.(wi_\d|wo|[qkvo])",
    r"h\.([0-9]|1[01])\.attn\.c_attn",
    r"[\w.]+\.query_key_value",
    r"layers\.\d{1,2}\.x{3}",
    "q_proj",
    "model.decoder.layers.0.self_attn.k_proj",
]

FIELDS = {
    "target_modules": lambda pattern: dict(target_modules=pattern),
    "exclude_modules": lambda pattern: dict(target_modules="all-linear", exclude_modules=pattern),
    "rank_pattern": lambda pattern: dict(target_modules="all-linear", rank_pattern={pattern: 3}),
    "alpha_pattern": lambda pattern: dict(target_modules="all-linear", alpha_pattern={pattern: 3}),
    "layers_pattern": lambda pattern: dict(
        target_modules=["x"], layers_pattern=[pattern], layers_to_transform=[0]
    ),
    "on_unsupported": lambda pattern: dict(target_modules="all-linear", on_unsupported=pattern),
    "output_slices": lambda pattern: dict(
        target_modules="all-linear", output_slices={pattern: [(0, 2)]}
    ),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(endless_regexes, "SECONDS", 1.0)
    endless_regexes._tried.cache_clear()


@pytest.fixture
def no_process(monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError(f"a process was started for {kwargs['input']}")

    monkeypatch.setattr(subprocess, "run", started)


def planned(config):
    return plan(lambda p, x: x @ p[NAME]["weight"], PARAMS, config, jnp.ones((2, 3)))


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_hangs_is_refused_by_the_plan(field, quick):
    pattern = HANGING[0]
    start = time.monotonic()
    with pytest.raises(PlanError, match=re.escape(f"{pattern!r}: got a regular expression that")):
        planned(LoraConfig(r=2, **FIELDS[field](pattern)))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("pattern", HANGING)
def test_what_hangs_is_suspicious(pattern):
    assert endless_regexes.is_suspicious(pattern)
    assert endless_regexes.is_suspicious(rf"(.*\.)?({pattern})$")


@pytest.mark.parametrize("pattern", COMMON)
def test_common_patterns_start_no_process(pattern, no_process):
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        one = LoraConfig(r=2, **FIELDS[field](pattern))
        assert config.hanging(one, [NAME] * 100) == []


def test_a_suspicious_pattern_that_ends_is_used(quick):
    found = planned(LoraConfig(r=2, target_modules=r"((\w+)\.)+query_projection"))
    assert [leaf.r for leaf in found.adapted] == [2]


def test_the_first_that_hangs_is_named_and_those_before_it_are_not(quick):
    patterns = {r"(x+)+y": 1, HANGING[1]: 2, HANGING[0]: 3}
    (said,) = config.hanging(LoraConfig(target_modules=["q"], rank_pattern=patterns), [NAME])
    assert said.startswith(repr(HANGING[1])) and "1 modules (still at it after 1 s)" in said


def test_without_a_process_what_is_suspicious_is_refused(quick, monkeypatch):
    monkeypatch.setattr(endless_regexes.sys, "executable", "/nowhere/python")
    with pytest.raises(PlanError, match="cannot be tried"):
        planned(LoraConfig(r=2, target_modules=r"((\w+)\.)+query_projection"))


ATOMS = st.sampled_from(["a", ".", r"\.", "[ab]", "[]a]", "(a|b)", "(?:ab)", r"\w", "a|", "(?i:b)"])
REPEATS = st.sampled_from(["", "*", "+", "?", "{2}", "{1,}", "{,3}", "*?", "{x}", "{}"])
REGEXES = st.recursive(
    st.builds("".join, st.lists(st.builds(str.__add__, ATOMS, REPEATS), max_size=3)),
    lambda inner: st.builds(lambda one, repeat: f"({one}){repeat}", inner, REPEATS),
    max_leaves=4,
)


def steps_of(regex: str) -> bool:
    """Tell what Python's parser sees: a repeat whose body repeats or branches."""
    parser = pytest.importorskip("re._parser")
    repeats = {parser.MAX_REPEAT, parser.MIN_REPEAT}

    def varies(body) -> bool:
        return any(
            (op in repeats and (arg[0] != arg[1] or varies(arg[2])))
            or op is parser.BRANCH
            or (op is parser.SUBPATTERN and varies(arg[-1]))
            for op, arg in body
        )

    def nested(body) -> bool:
        return any(
            (op in repeats and ((arg[1] > 1 and varies(arg[2])) or nested(arg[2])))
            or (op is parser.SUBPATTERN and nested(arg[-1]))
            or (op is parser.BRANCH and any(nested(one) for one in arg[1]))
            for op, arg in body
        )

    return nested(parser.parse(regex))


@settings(deadline=None, max_examples=300)
@given(REGEXES)
def test_no_repeat_within_a_repeat_is_overlooked(regex):
    try:
        re.compile(regex)
    except re.error:
        return
    if steps_of(regex):
        assert endless_regexes.is_suspicious(regex), regex


def test_fields_are_all_of_those_that_hold_patterns():
    kinds = {name for name in FIELDS if name in {f.name for f in dataclasses.fields(LoraConfig)}}
    assert kinds == FIELDS.keys()


def test_a_few_repeats_hang_on_a_long_name(quick):
    """Four repeats try the fourth power of a name's length: 2,000 characters take a week."""
    one = LoraConfig(target_modules=".*.*.*.*!")
    start = time.monotonic()
    (said,) = config.hanging(one, ["a" * 2000])
    assert said.startswith("'.*.*.*.*!': got a regular expression that comes to no end")
    assert config.hanging(one, ["a" * 40]) == []
    assert time.monotonic() - start < 10
