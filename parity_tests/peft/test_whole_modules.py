"""What is trained in full is in the file as PyTorch has it, embeddings and squares included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import Full, LoraConfig, load_pretrained, lora, merge, plan, save_pretrained

PREFIX = "base_model.model."


def fn(params, ids):
    x = params["embed"]["embedding"][ids]
    x = jnp.tanh(x @ params["mix"]["kernel"]) * params["norm"]["scale"]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


# Square ones do not tell by their shape which way round they are.
@pytest.mark.parametrize("rows", [4, 7])
def test_embeddings_stay_as_they_are_and_kernels_are_turned(rows, tmp_path):
    rng = np.random.default_rng(rows)
    shapes = {
        "embed": {"embedding": (rows, 4)},
        "mix": {"kernel": (4, 4)},
        "norm": {"scale": (4,)},
        "head": {"kernel": (4, rows), "bias": (rows,)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda one: isinstance(one, tuple),
    )
    ids = jnp.arange(3)
    config = LoraConfig(r=2, target_modules=["mix"], modules_to_save=["embed", "norm", "head"])
    found = plan(fn, params, config, ids)
    adapters = {
        path: Full(jnp.asarray(rng.standard_normal(one.value.shape), jnp.float32))
        if isinstance(one, Full)
        else one
        for path, one in found.init(jax.random.key(0)).items()
    }
    save_pretrained(tmp_path / "out", found, adapters)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = {
        "embed.weight": adapters["embed.embedding"].value,
        "norm.weight": adapters["norm.scale"].value,
        "head.weight": adapters["head.kernel"].value.T,
        "head.bias": adapters["head.bias"].value,
    }
    whole = {name: value for name, value in stored.items() if "lora_" not in name}
    assert whole.keys() == {PREFIX + name for name in wanted}
    for name, value in wanted.items():
        np.testing.assert_array_equal(whole[PREFIX + name], value, err_msg=name)
    again = load_pretrained(tmp_path / "out", found)
    assert again.keys() == adapters.keys()
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(one, other)
    # and they are what the function computes with
    replaced = {
        "embed": {"embedding": adapters["embed.embedding"].value},
        "mix": params["mix"],
        "norm": {"scale": adapters["norm.scale"].value},
        "head": {"kernel": adapters["head.kernel"].value, "bias": adapters["head.bias"].value},
    }
    np.testing.assert_allclose(
        lora(fn)(params, adapters, ids), fn(replaced, ids), rtol=1e-6, atol=1e-6
    )
    merged = merge(params, adapters)
    for module, leaves in replaced.items():
        for leaf, value in leaves.items():
            if module != "mix":
                np.testing.assert_array_equal(merged[module][leaf], value)
