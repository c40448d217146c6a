"""One model in PyTorch and in every front that ``trace`` takes, with a bug if one is asked for."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import numpy as np
import torch
from flax import nnx

from lora_jax.parity import tap

WIDTH, LAYERS = 6, 2
X = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def wrong_backward(x):
    return gelu(x)


def _forward(x):
    return jax.vjp(gelu, x)


wrong_backward.defvjp(_forward, lambda pull, g: (0.9 * pull(g)[0],))

ACTS = {None: gelu, "forward": jax.nn.gelu, "backward": wrong_backward}


# The model, in PyTorch and in every front: x + act(dense(x)), twice, and the bug in the second.


class TorchAct(torch.nn.Module):
    def __init__(self, bug=None):
        super().__init__()
        self.bug = bug

    def forward(self, x):
        y = torch.nn.functional.gelu(x, approximate="tanh" if self.bug == "forward" else "none")
        return y - 0.1 * (y - y.detach()) if self.bug == "backward" else y


class TorchLayer(torch.nn.Module):
    def __init__(self, bug=None):
        super().__init__()
        self.dense, self.act = torch.nn.Linear(WIDTH, WIDTH), TorchAct(bug)

    def forward(self, x):
        return x + self.act(self.dense(x))


class TorchNet(torch.nn.Module):
    def __init__(self, bug=None):
        super().__init__()
        self.layers = torch.nn.ModuleList([TorchLayer(), TorchLayer(bug)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


torch.manual_seed(0)
TORCH = TorchNet()
STATE = {name: value.numpy() for name, value in TORCH.state_dict().items()}
KERNELS = [STATE[f"layers.{n}.dense.weight"].T for n in range(LAYERS)]
BIASES = [STATE[f"layers.{n}.dense.bias"] for n in range(LAYERS)]


class Act(nn.Module):
    bug: str | None = None

    def __call__(self, x):
        return ACTS[self.bug](x)


class Layer(nn.Module):
    bug: str | None = None

    @nn.compact
    def __call__(self, x):
        return x + Act(self.bug, name="act")(nn.Dense(WIDTH, name="dense")(x))


class Net(nn.Module):
    bug: str | None = None

    @nn.compact
    def __call__(self, x):
        return Layer(self.bug, name="Layer_1")(Layer(name="Layer_0")(x))


def linen(bug):
    params = {
        f"Layer_{n}": {"dense": {"kernel": KERNELS[n], "bias": BIASES[n]}} for n in range(LAYERS)
    }
    return (lambda x: Net(bug).apply({"params": params}, x)), lambda name: re.sub(
        r"Layer_(\d)", r"layers.\1", name
    )


class NnxAct(nnx.Module):
    def __init__(self, bug):
        self.bug = bug

    def __call__(self, x):
        return ACTS[self.bug](x)


class NnxLayer(nnx.Module):
    def __init__(self, n, bug=None):
        self.dense, self.act = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), NnxAct(bug)
        self.dense.kernel[...], self.dense.bias[...] = KERNELS[n], BIASES[n]

    def __call__(self, x):
        return x + self.act(self.dense(x))


class NnxNet(nnx.Module):
    def __init__(self, bug):
        self.layers = nnx.List([NnxLayer(0), NnxLayer(1, bug)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def plain(bug):
    def fn(x):
        for n, act in enumerate((gelu, ACTS[bug])):
            h = tap(f"layers.{n}.dense", x @ KERNELS[n] + BIASES[n])
            x = tap(f"layers.{n}", x + tap(f"layers.{n}.act", act(h)))
        return x

    return fn, None


def from_torch(bug):
    module = TorchNet(bug)
    module.load_state_dict(TORCH.state_dict())
    return module, None


FRONTS = {
    "linen": linen,
    "nnx": lambda bug: (NnxNet(bug), None),
    "tap": plain,
    "from_torch": from_torch,
}
