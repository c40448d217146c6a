"""Small checks of how adapters begin, and of what is kept: merged weights and files."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ... import load_pretrained, merge, save_pretrained
from ... import plan as make_plan
from ...core.adapter import Adapter
from ...core.config.lora_config import LoraConfig
from ...peft.shapes.column_ranges import without_ranges
from ..verdicts import TensorVerdict
from .holding import held, same

# Experts, in, out.
EXPERTS = (4, 6, 5)


def start(seed: int) -> Iterator[TensorVerdict]:
    """Hold fresh adapters to PEFT's: B zero, A uniform in ±1/sqrt(in), and what is trained."""
    plan, _ = filed()
    fresh = plan.init(jax.random.key(seed))
    yield same("what is trained", [len(fresh)], [len(plan.adapted)])
    for name, one in fresh.items():
        assert isinstance(one, Adapter), f"{name}: a frozen weight is trained"
        bound = 1 / np.sqrt(one.a.shape[-2])
        filled = bool(0.7 * bound < abs(one.a).max() <= bound)
        yield same(f"{name}: A's bound and B", [filled, 1 + float(abs(one.b).max())], [1, 1])


def merging(seed: int) -> Iterator[TensorVerdict]:
    """Hold merged weights to PyTorch's sum in float32, rounded once: float32 and bfloat16."""
    import torch

    rng = np.random.default_rng(seed)
    # Integers of more bits than bfloat16 has, whose sums float32 holds.
    w = (100 * rng.standard_normal((8, 8))).round().astype(np.float32)
    a, b = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((8, 4), (4, 8)))
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        tensor = torch.from_numpy(w).to(dtype)
        pair = {"w": Adapter(jnp.asarray(a), jnp.asarray(b), 0.5)}
        ours = merge({"w": jnp.asarray(w, name)}, pair)["w"].astype("float32")
        wanted = (tensor.float() + 0.5 * torch.from_numpy(a @ b)).to(dtype)
        yield same(f"merged {name}", ours, wanted.float().numpy())


def files(seed: int) -> Iterator[TensorVerdict]:
    """Hold the ``ΔW`` that PEFT reads from our file to ours, and what we read back to both."""
    import peft
    import torch

    plan, table = filed()
    rng = np.random.default_rng(seed)
    adapters = {
        leaf.name: leaf.adapter(
            *(jnp.asarray(rng.standard_normal(s), "float32") for s in (leaf.a_shape, leaf.b_shape))
        )
        for leaf in plan.adapted
    }
    a, b = (np.asarray(getattr(adapters["layers.q"], part), "f8") for part in "ab")
    truth = {f"layers.{n}.q": 16 / 6 * (a[n] @ b[n].reshape(6, 12)).T for n in range(2)}
    one = adapters["proj.kernel[3:17]"]
    change = 16 / 6 * (np.asarray(one.a, "f8") @ np.asarray(one.b, "f8"))
    truth["proj"] = np.pad(change, ((0, 0), (3, 3))).T
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"q": torch.nn.Linear(12, 12)}) for _ in range(2)
    )
    net.proj = torch.nn.Linear(12, 20)
    with tempfile.TemporaryDirectory() as directory:
        saved = save_pretrained(f"{directory}/adapter", plan, adapters, names=table.__getitem__)
        wrapped = peft.PeftModel.from_pretrained(net, str(saved))
        whole, joined = without_ranges(plan, adapters)
        back: Any = load_pretrained(saved, whole, names=table.__getitem__)
    inside: Any = wrapped.base_model.model
    layers = dict(inside.named_modules())
    got = {name: layers[name].get_delta_weight("default").detach().numpy() for name in truth}
    narrow = {name: value.astype(np.float32) for name, value in truth.items()}
    yield from held(got, narrow, truth)
    for name, one in joined.items():
        assert isinstance(one, Adapter)
        yield same(f"{name}: A read back", back[name].a, one.a)
        yield same(f"{name}: B read back", back[name].b, one.b)


def expert_files(seed: int) -> Iterator[TensorVerdict]:
    """Hold the ``ΔW`` of every expert that PEFT reads from our file to ours."""
    import peft
    import torch

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.zeros(EXPERTS))

        def forward(self, x: Any) -> Any:
            return torch.bmm(x, self.up)

    plan, rng = experts(), np.random.default_rng(seed)
    (leaf,) = plan.adapted
    drawn = [rng.standard_normal(shape).astype("f4") for shape in (leaf.a_shape, leaf.b_shape)]
    adapters = {leaf.name: leaf.adapter(*map(jnp.asarray, drawn))}
    a, b = (value.astype("f8") for value in drawn)
    truth = {f"expert {n}": leaf.scale * (a[n] @ b[n]) for n in range(len(a))}
    net = torch.nn.Module()
    net.experts = Experts()
    with tempfile.TemporaryDirectory() as directory:
        saved = save_pretrained(f"{directory}/adapter", plan, adapters)
        inside: Any = peft.PeftModel.from_pretrained(net, str(saved)).base_model.model
        back: Any = load_pretrained(saved, plan)
    change = inside.experts.get_delta_weight("default").detach().numpy()
    got = {f"expert {n}": change[n] for n in range(len(a))}
    yield from held(got, {name: value.astype("f4") for name, value in truth.items()}, truth)
    yield same("A read back", back[leaf.name].a, drawn[0])
    yield same("B read back", back[leaf.name].b, drawn[1])


@functools.cache
def experts() -> Any:
    """Return the plan of a stack of experts that is a bare parameter."""
    params = {"experts": {"up": jnp.zeros(EXPERTS)}}
    config = LoraConfig(r=3, lora_alpha=7, target_parameters=["experts.up"])
    x = jnp.ones((EXPERTS[0], 2, EXPERTS[1]))
    return make_plan(lambda p, x: jnp.matmul(x, p["experts"]["up"]), params, config, x)


@functools.cache
def filed() -> tuple[Any, dict[str, str]]:
    """Return the plan of stacked layers with heads and of a range of columns, and their names."""

    def fn(params: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.einsum("nd,dhk->nhk", x, w).reshape(x.shape), None

        x = lax.scan(layer, x, params["layers"]["q"])[0]
        return x @ params["proj"]["kernel"]

    params = {"layers": {"q": jnp.zeros((2, 12, 3, 4))}, "proj": {"kernel": jnp.zeros((12, 20))}}
    config = LoraConfig(
        r=6, lora_alpha=16, target_modules=["q", "proj"], output_slices={"proj": [(3, 17)]}
    )
    names = {"layers.q": "layers.{}.q", "proj.kernel": "proj"}
    return make_plan(fn, params, config, jnp.ones((2, 12))), names
