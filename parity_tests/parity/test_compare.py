"""``compare``: what it says of twins, of planted bugs, and of comparisons that prove nothing."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from lora_jax.core.errors import ParityError
from lora_jax.parity import To, Verdict, compare, exact_inputs, judge, worst
from lora_jax.parity.reports.checks import Check, run_check
from lora_jax.parity.sides.jax_order import reordered
from lora_jax.parity.sides.torch_side import ModuleFn
from lora_jax.parity.verdicts import UNIT_ROUNDOFF, TensorVerdict, rel_l2

N, IN, OUT = 5, 30, 17


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


INPUTS = {
    "params": {
        "dense": {"kernel": normal(IN, OUT), "bias": normal(OUT)},
        "norm": {"scale": normal(OUT, seed=1)},
    },
    "x": normal(N, IN),
}
MAPPING = {
    "params.dense.kernel": To("dense.weight", axes=(1, 0)),
    "params.dense.bias": "dense.bias",
    "params.norm.scale": "norm.weight",
}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(IN, OUT)
        self.norm = torch.nn.LayerNorm(OUT, bias=False)

    def forward(self, x):
        return self.norm(torch.nn.functional.gelu(self.dense(x)))


def block(params, x, *, eps=1e-5, approximate=False, scale=1.0, narrow=False):
    dense = params["dense"]
    h = jax.nn.gelu(scale * (x @ dense["kernel"]) + dense["bias"], approximate=approximate)
    h = h.astype(jnp.float32) if narrow else h
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + eps) * params["norm"]["scale"]


def held(**bug):
    return compare(
        lambda **given: block(**given, **bug), ModuleFn(Block()), INPUTS, mapping=MAPPING
    )


def test_twins_differ_by_the_order_of_sums_alone():
    found = held()
    found.raise_for_verdict()
    assert [one.name for one in found.tensors] == [
        "y",
        "dparams.dense.bias",
        "dparams.dense.kernel",
        "dparams.norm.scale",
        "dx",
    ]
    assert {one.verdict for one in found.tensors} <= {Verdict.EXACT, Verdict.ORDER_ONLY}
    assert max(found.agreement.values()) < 1e-13
    assert not any(found.islands.values())


@pytest.mark.parametrize(
    "bug", [dict(eps=1e-6), dict(approximate=True), dict(scale=1 + 1e-6)], ids=str
)
def test_another_function_is_a_mismatch(bug):
    found = held(**bug)
    assert found.verdict is Verdict.MISMATCH
    with pytest.raises(AssertionError, match="different functions"):
        found.raise_for_verdict()


def test_float32_inside_the_float64_run_is_no_truth_and_is_named():
    found = held(narrow=True)
    assert found.verdict is Verdict.VACUOUS
    assert "convert_element_type to float32" in str(found)


def test_an_oracle_says_which_framework_is_wrong():
    inputs = {"x": normal(N, IN), "w": normal(IN, OUT)}

    def oracle(given, cotangents):
        x, w, g = given["x"], given["w"], cotangents["y"]
        return {"y": x @ w, "dx": g @ w.T, "dw": x.T @ g}

    def right(x, w):
        return x @ w

    def wrong(x, w):
        return x @ w * 1.001

    for jax_fn, torch_fn, guilty in ((right, wrong, "torch"), (wrong, right, "jax")):
        found = compare(jax_fn, torch_fn, inputs, oracle=oracle)
        assert {one.verdict for one in found.tensors} == {Verdict.MISMATCH}
        assert {one.further for one in found.tensors} == {guilty}
    assert compare(right, right, inputs, oracle=oracle).ok


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_exact_inputs_leave_no_tolerance(dtype):
    inputs = exact_inputs({"x": (4, 6), "a": (6, 3), "b": (3, 5)}, dtype=dtype)

    def right(x, a, b):
        return 0.5 * ((x @ a) @ b)

    found = compare(right, right, inputs, exact=True)
    assert {one.verdict for one in found.tensors} == {Verdict.EXACT}
    tiny = np.float32(2.0**-20)
    off = compare(lambda x, a, b: right(x, a, b) + tiny.astype(x.dtype), right, inputs, exact=True)
    assert off.verdict is Verdict.MISMATCH


def test_names_that_do_not_fit_are_listed():
    def fn(**given):
        return given["x"] @ given["w"]

    inputs = {"x": normal(N, IN), "w": normal(IN, OUT)}
    with pytest.raises(ParityError, match="v: mapped") as caught:
        compare(fn, fn, inputs, mapping={"v": "w", "x": "w"})
    assert "x: becomes 'w'" in str(caught.value)
    with pytest.raises(ParityError, match="y: of JAX's alone"):
        compare(fn, lambda **given: {"logits": fn(**given)}, inputs)
    assert compare(fn, lambda **given: {"logits": fn(**given)}, inputs, outputs={"y": "logits"}).ok
    with pytest.raises(ParityError, match=r"y: jax \(2, 3\), torch \(3, 2\)"):
        compare(lambda x: 2 * x, lambda x: 2 * x.T, {"x": np.ones((2, 3), np.float32)})
    with pytest.raises(ParityError, match="z: not an input"):
        compare(fn, fn, inputs, wrt=["z"])
    with pytest.raises(ParityError, match="wrt: got no path, wanted some of w, x;"):
        compare(fn, fn, inputs, wrt=())
    whole = {name: np.ones((2, 2), np.int32) for name in inputs}
    with pytest.raises(ParityError, match="inputs: got none of floating dtype"):
        compare(fn, fn, whole)


def test_a_rounded_scale_in_bfloat16_is_a_bias():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape) for shape in ((640, 60), (60, 530)))
    truth, unit = a @ b, UNIT_ROUNDOFF["bfloat16"]
    fine = truth.astype(ml_dtypes.bfloat16)
    off = (truth * float(ml_dtypes.bfloat16(16 / 6) / (16 / 6))).astype(ml_dtypes.bfloat16)
    assert judge("y", fine, fine, truth, unit_roundoff=unit).verdict is Verdict.EXACT
    found = judge("y", off, fine, truth, unit_roundoff=unit)
    assert found.verdict is Verdict.BIASED and found.slope == pytest.approx(1.95e-3, abs=2e-4)


def test_nothing_compared_is_vacuous():
    assert worst([]) is Verdict.VACUOUS
    zero, unit = np.zeros((3, 4)), UNIT_ROUNDOFF["float32"]
    for truth in (zero, zero + np.nan, np.ones((3, 4), np.float32)):
        found = judge("y", zero, zero, truth, unit_roundoff=unit)
        assert found.verdict is Verdict.VACUOUS and found.why
    found = judge("y", zero, zero[:1], zero + 1, unit_roundoff=unit)
    assert found.verdict is Verdict.MISMATCH and "shapes" in found.why
    found = judge("y", zero + np.nan, zero + 1, zero + 1, unit_roundoff=unit)
    assert found.verdict is Verdict.MISMATCH


def test_a_check_that_raises_or_lacks_a_package_is_said_to():
    broken = run_check(Check("one", 1, lambda seed: [][seed]))
    assert broken.verdict is Verdict.MISMATCH and "IndexError" in broken.error
    skipped = run_check(Check("two", 1, lambda seed: [], needs=("no_such_package",)))
    assert skipped.verdict is None and "pip install no_such_package" in skipped.skipped
    empty = run_check(Check("three", 1, lambda seed: []))
    assert empty.verdict is Verdict.VACUOUS


def test_reordered_sums_differ_by_rounding_in_every_nested_jaxpr():
    x, w = jnp.asarray(normal(4, 60)), jnp.asarray(normal(3, 60, 60) / 8)

    def loss(w, x):
        def body(h, one):
            return jax.nn.gelu(jax.nn.relu(h @ one) + h), None

        return jax.nn.softmax(jax.lax.scan(jax.checkpoint(body), x, w)[0]).var()

    step = jax.jit(jax.grad(loss))
    once, again = step(w, x), reordered(step)(w, x)
    assert 0 < rel_l2(np.asarray(again), np.asarray(once, np.float64)) < 1e-4


def test_the_package_imports_without_torch():
    code = "import sys; sys.modules['torch'] = None; import lora_jax.parity as p; print(p.judge)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_verdict_says_who_is_further_and_why():
    one = TensorVerdict("y", Verdict.MISMATCH, jax=2e-3, torch=1e-7, why="wrong")
    assert one.further == "jax" and one.ratio == pytest.approx(2e4)
    assert "further away: jax" in str(one) and str(one).endswith("wrong")
