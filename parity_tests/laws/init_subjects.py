"""Two layers in PyTorch and in JAX, and the runs of PEFT's initialisations on them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

from lora_jax import LoraConfig, initialise, plan

FIELDS = dict(
    r=2,
    lora_alpha=5,
    target_modules=["up", "down"],
    rank_pattern={"down": 3},
    alpha_pattern={"down": 7},
)
KEY = jax.random.key(0)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 10), torch.nn.Linear(10, 9)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def fn(params, x):
    h = jnp.tanh(x @ params["up.weight"].T + params["up.bias"])
    return h @ params["down.weight"].T + params["down.bias"]


def loss(params, x):
    return (fn(params, x) ** 2).mean()


def model():
    torch.manual_seed(3)
    return Tiny()


def inputs(n=2):
    """Batches whose directions differ clearly in size."""
    rng = np.random.default_rng(4)
    sizes = 1.5 ** -np.arange(8)
    mix = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    return [np.float32(rng.normal(size=(40, 8)) * 2 * sizes @ mix + 0.3) for _ in range(n)]


def ours(fields, batches=None, **options):
    params = {k: jnp.asarray(v.detach().numpy()) for k, v in model().state_dict().items()}
    found = plan(fn, params, LoraConfig(**FIELDS | fields), jnp.ones((2, 8)))
    of = loss if fields["init_lora_weights"] == "lora_ga" else fn
    data = None if batches is None else [(jnp.asarray(x),) for x in batches]
    base, adapters = initialise(found, params, KEY, fn=of, batches=data, **options)
    return found, params, base, adapters


def run_corda(torch_model, config, batches):
    from peft.tuners.lora.corda import preprocess_corda

    def run():
        for x in batches:
            torch_model(torch.from_numpy(x))

    preprocess_corda(torch_model, config, run_model=run)
    return peft.get_peft_model(torch_model, config)


def run_lora_ga(torch_model, config, batches):
    def step():
        for x in batches:
            (torch_model(torch.from_numpy(x)) ** 2).mean().backward()

    preprocess_loraga(torch_model, config, step)
    return peft.get_peft_model(torch_model, config)


def run_eva(torch_model, config, batches):
    wrapped = peft.get_peft_model(torch_model, config, low_cpu_mem_usage=True)
    loader = [dict(x=torch.from_numpy(np.concatenate(batches)))]
    initialize_lora_eva_weights(
        wrapped,
        loader,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return wrapped


def run_weights(torch_model, config, batches):
    return peft.get_peft_model(torch_model, config)


def entries(wrapped, modules=("up", "down")):
    """Return PEFT's A, B and base by our paths, in our layout."""
    found = {}
    for module in modules:
        layer = getattr(wrapped.base_model.model, module)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts = (a.T, b.T, layer.base_layer.weight)
        found[f"{module}.weight"] = [np.float64(x.detach().numpy()) for x in parts]
    return found


def directions(a, b):
    """Return what does not depend on the signs of singular vectors."""
    one_by_one = np.einsum("ir,ro->rio", np.float64(a), np.float64(b))
    return one_by_one, np.float64(a) @ np.float64(a).T, np.float64(b).T @ np.float64(b)
