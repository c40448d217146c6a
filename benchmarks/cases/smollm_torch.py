"""The PyTorch side of the SmolLM2-shaped cases: transformers' Llama and PEFT."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..case import Arrays, Unsupported, Work
from ..contestants.common import on_host, torch_arrays, torch_ready, torch_work
from . import decoder, smollm_jax, smollm_model
from .decoder import Params, Sizes
from .smollm_model import LEARNING_RATE, MODULES, WEIGHT_DECAY, Task


def llama(task: Task, params: Params) -> Any:
    """Return transformers' model in the task's dtype, with these weights, layers stacked."""
    torch = torch_ready()
    import transformers

    sizes = task.sizes
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        max_position_embeddings=max(sizes.tokens, 8192),
        rope_theta=sizes.theta,
        rms_norm_eps=sizes.eps,
        tie_word_embeddings=sizes.tied,
        use_cache=False,
    )
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=getattr(torch, task.dtype))
    # A view of JAX's memory must not be written to, and PyTorch warns of one.
    own = {name: torch.from_numpy(np.array(array)) for name, array in _state(sizes, params)}
    model.load_state_dict(own)
    return model


def training(task: Task, *, compile: bool = False) -> Work:
    """Return the usual training step of the PEFT model, eager or compiled."""
    torch = torch_ready()
    model = peft_model(task)
    call = _compiled(model) if compile else model
    trained = [p for p in model.parameters() if p.requires_grad]
    tuned = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    step = _step(call, tuned, _batches(task))

    def read(loss: Any) -> Arrays:
        def by_linear(of: Callable[[Any], Any]) -> dict[tuple[str, str], np.ndarray]:
            return {
                (name, part): np.stack(
                    [on_host(of(p)).T for p in _parts(model, task.sizes, name, part)]
                )
                for name in decoder.TARGETS
                for part in ("a", "b")
            }

        trees = {
            "adapters": by_linear(lambda p: p),
            "mean gradient": by_linear(lambda p: tuned.state[p]["exp_avg"]),
        }
        return smollm_model.results(on_host(loss), trees)

    return torch_work(step, read)


def forward(task: Task, *, compile: bool = False) -> Work:
    """Return the forward step of the PEFT model, from tokens to all logits."""
    torch = torch_ready()
    model = peft_model(task)
    call, ids = _compiled(model) if compile else model, _batches(task)

    def step() -> Any:
        with torch.no_grad():
            return call(input_ids=next(ids)).logits

    return torch_work(step, lambda logits: torch_arrays(logits[:, -1]))


def full(task: Task) -> Work:
    """Return full fine-tuning's step, from the weights with the adapters merged in."""
    torch = torch_ready()
    params = smollm_jax.merged(task)
    model = llama(
        task, {**params, "layers": {k: np.asarray(w) for k, w in params["layers"].items()}}
    )
    tuned = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return torch_work(_step(model, tuned, _batches(task)))


def compiling(task: Task) -> Work:
    """Return the step that compiles forward and backward anew and takes both once.

    PyTorch compiles when it is called. Its caches on disk are off.
    """
    torch_ready()
    from torch import compiler

    model, ids = peft_model(task), _batches(task)
    config: Any = compiler.config

    def step() -> Any:
        batch = next(ids)
        compiler.reset()
        model.zero_grad()
        with config.patch(force_disable_caches=True):
            loss = _compiled(model)(input_ids=batch, labels=batch).loss
            loss.backward()
        return loss

    return torch_work(step)


def peft_model(task: Task) -> Any:
    """Return the PEFT model with the weights and adapters that all contestants start from."""
    import peft

    base = llama(task, smollm_model.weights(task.sizes))
    with smollm_model.saved(task) as directory:
        return peft.PeftModel.from_pretrained(base, directory, is_trainable=True)


def _step(call: Any, tuned: Any, ids: Iterator[Any]) -> Callable[[], Any]:
    def step() -> Any:
        batch = next(ids)
        loss = call(input_ids=batch, labels=batch).loss
        tuned.zero_grad()
        loss.backward()
        tuned.step()
        return loss

    return step


def _compiled(model: Any) -> Any:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Unsupported("torch.compile needs a C++ compiler")
    return torch_ready().compile(model)


def _batches(task: Task) -> Iterator[Any]:
    torch = torch_ready()
    return itertools.cycle(
        [torch.tensor(ids, dtype=torch.long) for ids in smollm_model.batches(task.sizes)]
    )


def _parts(model: Any, sizes: Sizes, name: str, part: str) -> list[Any]:
    """Return A or B of a linear in each layer."""
    layers = model.get_base_model().model.layers
    linears = [layers[n].get_submodule(MODULES[name]) for n in range(sizes.layers)]
    return [getattr(linear, f"lora_{part.upper()}")["default"].weight for linear in linears]


def _state(sizes: Sizes, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yield transformers' names and arrays; PyTorch's kernels are ``(out, in)``."""
    yield "model.embed_tokens.weight", np.asarray(params["embedding"])
    yield "model.norm.weight", np.asarray(params["norm"])
    yield "lm_head.weight", np.asarray(decoder.head(params)).T
    modules = MODULES | {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    for n in range(sizes.layers):
        for name, module in modules.items():
            yield f"model.layers.{n}.{module}.weight", params["layers"][name][n].T
