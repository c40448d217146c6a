"""Initialisations beside DoRA, rsLoRA, patterns and ranges of columns: each changes what it says.

Laws between two configurations, so that no initialisation's own formula is needed here.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Adapter, LoraConfig, initialise, merge, plan
from lora_jax.core import delta, paths
from lora_jax.core.initializers import changes_base

SHAPES = {"up": (8, 10), "down": (10, 9), "fused": (9, 12)}
RANGES = ((0, 5), (7, 12))
KEY = jax.random.key(3)
# What makes it, what it reads, and its options.
INITS = {
    "true": (True, "", {}),
    "false": (False, "", {}),
    "gaussian": ("gaussian", "", {}),
    "orthogonal": ("orthogonal", "", {}),
    "olora": ("olora", "", {}),
    "pissa": ("pissa", "", {}),
    "pissa_niter": ("pissa_niter_20", "", {}),
    "mica": ("mica", "", {}),
    "eva": ("eva", "data", {}),
    "corda": ("corda", "data", {}),
    "lora_ga": ("lora_ga", "gradient", {}),
    "loftq": ("loftq", "", {"bits": 4, "iterations": 2}),
}


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"])
    return jnp.tanh(h @ params["down"]["kernel"]) @ params["fused"]["kernel"]


def parted(params, x):
    """The same function, with the columns of the last weight apart."""
    h = jnp.tanh(jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"])
    return jnp.concatenate([h @ params[name]["kernel"] for name in ("q", "k", "v")], axis=1)


@functools.cache
def weights(apart=False):
    rng = np.random.default_rng(0)
    of = {name: rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in SHAPES.items()}
    if apart:
        fused = of.pop("fused")
        of |= {"q": fused[:, :5], "k": fused[:, 5:7], "v": fused[:, 7:]}
    return {name: {"kernel": jnp.asarray(w, jnp.float32)} for name, w in of.items()}


def inputs():
    rng = np.random.default_rng(4)
    return jnp.asarray(rng.normal(size=(40, 8)) * 2 * 1.5 ** -np.arange(8.0) + 0.3, jnp.float32)


@functools.cache
def made(name, apart=False, targets=("up", "down", "fused"), **options):
    """Return the base and the adapters of an initialisation, by path."""
    init, reads, own = INITS[name]
    fn, params = parted if apart else model, weights(apart)
    if "ranges" in options:
        options["output_slices"] = {"fused": list(options.pop("ranges"))}
    if "patterns" in options:
        r, alpha = options.pop("patterns")
        options |= dict(rank_pattern={"down": r}, alpha_pattern={"down": alpha})
    fields = dict(r=2, lora_alpha=5, target_modules=list(targets)) | options
    found = plan(fn, params, LoraConfig(init_lora_weights=init, **fields), inputs())
    data = dict(fn=fn, batches=[(inputs(),)]) if reads else {}
    if reads == "gradient":
        data["fn"] = lambda params, x: (fn(params, x) ** 2).mean()
    base, adapters = initialise(found, params, KEY, **data, **own)
    return paths.flatten(base), adapters


def equal(got: Adapter, wanted: Adapter, name):
    assert got.scale == wanted.scale, name
    np.testing.assert_array_equal(got.a, wanted.a, err_msg=name)
    np.testing.assert_array_equal(got.b, wanted.b, err_msg=name)


def close(got, wanted, name, atol=2e-5):
    np.testing.assert_allclose(np.float64(got), np.float64(wanted), atol=atol, err_msg=name)


def test_dora_adds_the_norms_of_what_the_weights_are_at_the_start():
    """A, B and the base are those without it; m is ‖base + s·A·B‖, so its gain is 1."""
    for name in INITS:
        (base, plain), (same, dora) = made(name), made(name, use_dora=True)
        for path, adapter in dora.items():
            equal(adapter, plain[path], name)
            np.testing.assert_array_equal(same[path], base[path], err_msg=name)
            whole = np.float64(base[path]) + np.float64(delta.delta(plain[path]))
            close(adapter.magnitude, np.linalg.norm(whole, axis=0), name)
            if changes_base(INITS[name][0]) and name != "loftq":
                original = np.float64(paths.flatten(weights())[path])
                close(adapter.magnitude, np.linalg.norm(original, axis=0), name)


def test_every_one_but_false_and_loftq_leaves_the_model_as_it_is():
    """With every option at once: LoftQ's base is off by what quantising takes."""
    whole = paths.flatten(weights())
    for name in INITS:
        base, adapters = made(name, use_rslora=True, patterns=(4, 7), ranges=RANGES)
        merged = merge(base, adapters)
        far = max(float(np.abs(merged[path] - whole[path]).max()) for path in whole)
        assert far < 1e-4 if name not in ("false", "loftq") else 1e-3 < far < 10, name


def test_rslora_is_another_scale_and_nothing_else():
    for name in INITS:
        root = math.sqrt(2)
        (base, rank_stabilised), (same, plain) = (
            made(name, use_rslora=True),
            made(name, lora_alpha=5 * root),
        )
        for path, adapter in plain.items():
            assert abs(rank_stabilised[path].scale - 5 / root) < 1e-12, name
            close(rank_stabilised[path].a, adapter.a, name)
            close(rank_stabilised[path].b, adapter.b, name)
            close(base[path], same[path], name)


def test_a_pattern_is_the_configuration_of_its_layer():
    for name in INITS:
        (base, adapters), (other, whole) = (
            made(name, patterns=(4, 7)),
            made(name, r=4, lora_alpha=7),
        )
        _, plain = made(name)
        assert adapters["down.kernel"].scale == 7 / 4
        equal(adapters["down.kernel"], whole["down.kernel"], name)
        np.testing.assert_array_equal(base["down.kernel"], other["down.kernel"], err_msg=name)
        for path in ("up.kernel", "fused.kernel"):
            equal(adapters[path], plain[path], name)


def test_a_range_of_columns_is_a_weight_of_its_own():
    """What reads the weight, the inputs or the gradient reads the range's; the rest stays."""
    for name, (init, *_) in INITS.items():
        base, adapters = made(name, ranges=RANGES)
        split, apart = made(name, apart=True, targets=("up", "down", "q", "v"))
        whole = np.asarray(paths.flatten(weights())["fused.kernel"])
        np.testing.assert_array_equal(base["fused.kernel"][:, 5:7], whole[:, 5:7], err_msg=name)
        for (start, stop), module in zip(RANGES, ("q", "v"), strict=True):
            adapter = adapters[f"fused.kernel[{start}:{stop}]"]
            alone = apart[f"{module}.kernel"]
            assert adapter.columns == (start, stop)
            assert adapter.scale == alone.scale == 2.5
            if name in ("true", "false", "gaussian", "orthogonal"):
                continue  # drawn, from keys of their own
            # A pair of singular vectors has a sign, and what is random its own key.
            loose = 1e-3 if name == "pissa_niter" or name.startswith("lora_ga") else 1e-4
            close(delta.delta(adapter), delta.delta(alone), name, loose)
            close(np.abs(adapter.a), np.abs(alone.a), name, loose)
            close(np.abs(adapter.b), np.abs(alone.b), name, loose)
            part = base["fused.kernel"][:, start:stop]
            close(part, split[f"{module}.kernel"], name, loose)
        if changes_base(init):
            assert (base["fused.kernel"] != whole).any(), name


def test_what_is_drawn_is_drawn_for_each_path_and_each_range():
    """No two A's are one: of ranges of a weight, of weights of one shape, of stacked layers."""
    shape = (6, 8)
    params = {name: {"kernel": jnp.ones(shape)} for name in ("q", "k")}
    params |= {"fused": {"kernel": jnp.ones((6, 16))}, "layers": {"kernel": jnp.ones((2, *shape))}}

    def fn(params, x):
        last = jnp.einsum("bi,lio->blo", x, params["layers"]["kernel"])
        outs = [x @ params[name]["kernel"] for name in ("q", "k", "fused")]
        return *outs, last

    for init in (True, False, "gaussian", "orthogonal", "kaiming_uniform_rank", "torch"):
        config = LoraConfig(
            r=2,
            target_modules=["q", "k", "fused", "layers"],
            output_slices={"fused": [(0, 8), (8, 16)]},
            init_lora_weights=init,
        )
        adapters = plan(fn, params, config, jnp.ones((3, 6))).init(KEY)
        drawn = [adapters[path].a for path in adapters if path != "layers.kernel"]
        layers = adapters["layers.kernel"]
        # The model keeps the stack's axis here, so its letter is that of an output.
        drawn += [*layers.a] if layers.axes == "sio" else []
        assert len(drawn) >= 4 and all(a.shape == (6, 2) for a in drawn), layers.axes
        for n, one in enumerate(drawn):
            for other in drawn[:n]:
                assert np.abs(one - other).max() > 1e-2, f"{init}: two weights share their draw"
