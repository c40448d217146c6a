"""Levels 2 and 6 for whole models: every gradient of PEFT's, and PEFT's files both ways."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import guards
from ..reports.checks import Check
from ..tensors import Tensors
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, Vacuous, judge

NEEDS = ("torch", "peft", "transformers", "torchax")
UNIT = UNIT_ROUNDOFF["float32"]

# Roundings in the chain of products behind one gradient or logit of two layers.
CHAIN = 32.0

# Two float64 runs of one model agree to this.
AGREEMENT = 1e-13

DEEP = "llama of 8 layers"
NAMES = ("bert", "gpt2", "llama", "vit", "qwen3")
QUICK = ("bert",)


def gradients(name: str, seed: int) -> Iterator[TensorVerdict]:
    """Hold the loss, the logits and every gradient to the rule; the truth is PEFT's in float64."""
    from ...peft.tensors import encode
    from .jax_models import arrays

    theirs, truth = _theirs(name, seed)
    given, adapters = _given(name, seed)
    got = given.run(adapters)
    _same_names(got, truth)
    guards.refuse(
        guards.vacuity(
            factors=arrays(encode(given.plan, adapters)),
            shapes=[np.shape(value) for value in given.params.values() if np.ndim(value) > 1],
            outputs=(truth["logits"], given.run(given.plan.init(_key(0)))["logits"]),
            scales={name: one.scale for name, one in adapters.items() if hasattr(one, "scale")},
            truth={name: value for name, value in truth.items() if value.ndim},
        )
    )
    for tensor, value in got.items():
        arrays = (np.atleast_1d(one) for one in (value, theirs[tensor], truth[tensor]))
        yield judge(tensor, *arrays, unit_roundoff=UNIT, cond=CHAIN * (4 if name == DEEP else 1))


def truths(name: str, seed: int) -> Iterator[TensorVerdict]:
    """Hold the two frameworks' float64 runs to each other: what ``gradients`` calls the truth."""
    given, adapters = _given(name, seed)
    got, narrow = given.wide(adapters)
    narrow += _narrow_in_torch(name, seed)
    if narrow:
        raise Vacuous(f"narrower than float64: {'; '.join(narrow[:6])}")
    _, truth = _theirs(name, seed)
    _same_names(got, truth)
    unit = UNIT_ROUNDOFF["float64"]
    for tensor, value in got.items():
        ours, theirs = np.atleast_1d(value), np.atleast_1d(truth[tensor])
        yield judge(tensor, ours, theirs, theirs, unit_roundoff=unit, cond=AGREEMENT / unit)


def files(name: str, seed: int) -> Iterator[TensorVerdict]:
    """Compare keys, bits and logits of an adapter's file that PEFT reads, and of one it writes."""
    from ... import load_config, load_pretrained, plan, save_pretrained
    from ...peft.tensors import encode
    from . import torch_models
    from .jax_models import arrays

    given, adapters = _given(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_pretrained(Path(folder, "ours"), given.plan, adapters)
        theirs = given.model.peft_load(saved, is_trainable=True)
        in_peft = torch_models.copied(dict(torch_models.trainable(theirs)))
        theirs.save_pretrained(Path(folder, "peft"))
        found = plan(given.fn, given.params, load_config(Path(folder, "peft")), **given.model.batch)
        again = load_pretrained(Path(folder, "peft"), found)
        ours, back = arrays(encode(given.plan, adapters)), arrays(encode(found, again))
    _same_names(ours, in_peft)
    _same_names(back, in_peft)
    for tensor, value in ours.items():
        exact: Any = dict(unit_roundoff=UNIT, exact=True)
        yield judge(f"ours in PEFT: {tensor}", value, in_peft[tensor], _wide(value), **exact)
        yield judge(f"PEFT's in ours: {tensor}", back[tensor], value, _wide(value), **exact)
    reference, truth = _theirs(name, seed)
    logits = np.asarray(given.step(again, given.params)[0][1])
    yield judge(
        "logits", logits, reference["logits"], truth["logits"], unit_roundoff=UNIT, cond=CHAIN
    )


def _given(name: str, seed: int) -> Any:
    # Here, so that the table of checks imports without PyTorch.
    from . import jax_models

    given = jax_models.given(name)
    return given, given.adapters(seed)


def _key(seed: int) -> Any:
    import jax

    return jax.random.key(seed)


@functools.cache
def _theirs(name: str, seed: int) -> tuple[Tensors, Tensors]:
    """Return what PEFT computes with our adapters, in float32 and in float64."""
    from ..sides.wide_torch import widened
    from . import torch_models

    given, model = _given(name, seed)[0], _peft(name, seed)
    runs = [
        torch_models.outputs_and_gradients(m, given.model.batch) for m in (model, widened(model))
    ]
    return runs[0], runs[1]


def _peft(name: str, seed: int) -> Any:
    from ... import save_pretrained

    given, adapters = _given(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_pretrained(Path(folder, "adapter"), given.plan, adapters)
        return given.model.peft_load(saved, is_trainable=True)


def _narrow_in_torch(name: str, seed: int) -> list[str]:
    from ..sides import torch_side
    from ..sides.wide_torch import widened

    model = widened(_peft(name, seed))
    return torch_side.islands(
        lambda **batch: model(**batch).logits, _given(name, seed)[0].model.batch
    )


def _same_names(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{name}: of JAX's alone" for name in got.keys() - wanted.keys()]
    problems += [f"{name}: of PEFT's alone" for name in wanted.keys() - got.keys()]
    if problems:
        raise AssertionError("the trained tensors differ:\n  " + "\n  ".join(sorted(problems)))


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64)


def _checks() -> Iterator[Check]:
    for name in (*NAMES, DEEP):
        slow = name not in QUICK
        yield Check(f"{name}/peft gradients", 2, partial(gradients, name), NEEDS, slow)
        yield Check(f"{name}/peft float64 truths", 2, partial(truths, name), NEEDS, True)
        if name != DEEP:
            yield Check(f"{name}/peft files", 6, partial(files, name), NEEDS, slow)


CHECKS = tuple(_checks())
