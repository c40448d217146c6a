"""The laws on models that nobody here wrote, and an oracle for the one that has no float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import lora
from parity_tests.laws import laws
from parity_tests.models import third_party
from parity_tests.tiers import cases

# Near twins of models in the default suite, and the longest to compile op by op.
SLOW = (
    "gpt2",
    "gpt2_cached",
    "bert",
    "bart",
    "marian",
    "mistral",
    "gemma",
    "gpt_neo",
    "clip",
    "haiku_lstm",
    "t5",
    "whisper",
    "vit",
    "haiku_mobilenet",
)

SUBJECTS = cases(third_party.ALL, slow=SLOW)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_identity(subject):
    laws.identity(subject)


LAWS = [laws.merging, laws.gradient]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_law(law, subject):
    with laws.quick_compilation():
        law(subject)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_planning(subject):
    laws.planning(subject)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_agreement(subject):
    laws.agreement(subject)


def test_cached_decoding_is_as_near_to_the_truth_as_the_merged_model():
    """The whole sequence in float64 is the truth for what the cache computes in float32."""
    whole, cached = (
        next(s for s in third_party.ALL if s.name == n) for n in ("gpt2", "gpt2_cached")
    )
    with laws.quick_compilation():
        adapters, fn, params, (ids, cache) = laws.random_adapters(cached)
        got = laws.jit(lora(fn))(params, adapters, ids, cache)[0]
        merged = laws.jit(fn)(laws.merge(params, adapters), ids, cache)[0]
        with jax.enable_x64(True):
            adapters, fn, params, _ = laws.random_adapters(whole, np.float64)
            truth = laws.jit(lora(fn))(params, adapters, ids)
    # float32 weights are the float64 ones, rounded
    rounding = 2.0**-24
    ours, theirs = laws.relative(got, truth), laws.relative(merged, truth)
    assert ours <= 2 * theirs + rounding, (ours, theirs)
    assert theirs <= 64 * rounding, "the truth is of another model"
