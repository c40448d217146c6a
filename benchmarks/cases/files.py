"""Saving and loading an adapter of SmolLM2's size, as PEFT's two files.

Every step saves or loads another of two adapters, and what it wrote or read is compared bit for
bit. All contestants write to, and read from, a temporary directory of their own, which the
system's cache holds: what is timed is their work, not the disk's. Ours asks the disk to have the
bytes before it puts a file in place; PEFT does not, nor does safetensors alone.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lora_jax import Adapter, LoraConfig, Plan, load_pretrained, plan, save_pretrained

from ..case import Arrays, Case, Contestant, Needed, Work
from ..contestants.common import (
    jax_settings,
    on_host,
    torch_device,
    torch_ready,
    torch_settings,
    torch_work,
)
from . import decoder

R, TURNS = 16, 2
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder's linears, as SmolLM2-135M has them."""

    layers: int = 30
    width: int = 576
    keys: int = 192
    hidden: int = 1536

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """The input and output of each linear of a layer."""
        d, k, h = self.width, self.keys, self.hidden
        square, narrow = dict.fromkeys("qo", (d, d)), dict.fromkeys("kv", (d, k))
        return {**square, **narrow, "gate": (d, h), "up": (d, h), "down": (h, d)}

    @property
    def factors(self) -> int:
        """How many values A and B of all linears have."""
        return self.layers * R * sum(map(sum, self.linears.values()))


def planned(sizes: Sizes) -> Plan:
    """Return the plan for every linear; the function has their products and nothing else."""
    params = {
        "layers": [
            {
                name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
                for name, shape in sizes.linears.items()
            }
            for _ in range(sizes.layers)
        ]
    }

    def products(params: Any, rows: Mapping[int, jax.Array]) -> list[jax.Array]:
        return [
            rows[one["kernel"].shape[0]] @ one["kernel"]
            for layer in params["layers"]
            for one in layer.values()
        ]

    rows = {n: jax.ShapeDtypeStruct((1, n), jnp.float32) for n in (sizes.width, sizes.hidden)}
    targets = tuple(sizes.linears)
    return plan(products, params, LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets), rows)


def drawn(found: Plan) -> list[dict[str, Any]]:
    """Return the adapters of all turns."""
    return [decoder.draw(found.abstract(), seed=n) for n in range(TURNS)]


def tensors(adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the adapters' tensors by their names in the file."""
    return {
        f"{PREFIX}{path.removesuffix('.kernel')}.lora_{name.upper()}.weight": np.ascontiguousarray(
            np.asarray(getattr(pair, name)).T
        )
        for path, pair in adapters.items()
        if isinstance(pair, Adapter)
        for name in "ab"
    }


def our_saving(sizes: Sizes) -> Work:
    """Return the work of ``save_pretrained``."""
    found = planned(sizes)
    turns = itertools.cycle(drawn(found))
    return _saving(lambda to: save_pretrained(to, found, next(turns), overwrite=True))


def bare_saving(sizes: Sizes) -> Work:
    """Return the work of writing the same tensors, and nothing else."""
    turns = itertools.cycle(drawn(planned(sizes)))
    return _saving(lambda to: safetensors.numpy.save_file(tensors(next(turns)), to / WEIGHTS))


def peft_saving(sizes: Sizes) -> Work:
    """Return the work of PEFT's ``save_pretrained``."""
    torch_ready()
    found = planned(sizes)
    with tempfile.TemporaryDirectory() as scratch:
        models = [_peft_loaded(sizes, one) for one in _saved(Path(scratch), found)]
    turns = itertools.cycle(models)
    return _saving(lambda to: next(turns).save_pretrained(to))


def our_loading(sizes: Sizes) -> Work:
    """Return the work of ``load_pretrained``."""
    found = planned(sizes)
    scratch = Path(tempfile.mkdtemp())
    turns = itertools.cycle(_saved(scratch, found))

    def step() -> Any:
        return jax.block_until_ready(load_pretrained(next(turns), found))

    _remove_with(step, scratch)
    return Work(step, lambda adapters: _wide(tensors(adapters)))


def peft_loading(sizes: Sizes, *, weights_alone: bool) -> Work:
    """Return the work of loading with PEFT.

    Args:
        sizes: of the linears.
        weights_alone: into a model that has an adapter already, where ``from_pretrained`` first
            puts one into the base; what it put there is taken out again outside the clock.
    """
    torch_ready()
    import peft

    scratch = Path(tempfile.mkdtemp())
    directories = _saved(scratch, planned(sizes))
    turns = itertools.cycle(directories)
    models = [_peft_loaded(sizes, directories[0])]

    def prepare() -> None:
        if not weights_alone:
            models.append(models.pop().unload())

    def step() -> Any:
        directory = next(turns)
        if weights_alone:
            weights = peft.load_peft_weights(str(directory), device=torch_device())
            peft.set_peft_model_state_dict(models[0], weights)
        else:
            models.append(peft.PeftModel.from_pretrained(models.pop(), directory))
        return models[0]

    def read(model: Any) -> Arrays:
        state = peft.get_peft_model_state_dict(model)
        return _wide({name: on_host(value) for name, value in state.items()})

    _remove_with(step, scratch)
    return torch_work(step, read, prepare)


def torch_base(sizes: Sizes) -> Any:
    """Return a PyTorch module with these linears, and no values in their weights."""
    torch, device = torch_ready(), torch_device()

    def layer() -> Any:
        return torch.nn.ModuleDict(
            {
                name: torch.nn.Linear(*shape, bias=False, device="meta").to_empty(device=device)
                for name, shape in sizes.linears.items()
            }
        )

    layers = torch.nn.ModuleList(layer() for _ in range(sizes.layers))
    return torch.nn.ModuleDict({"layers": layers})


def case(
    name: str, title: str, sizes: Sizes, contestants: Mapping[str, Callable[[], Work]]
) -> Case:
    """Return one of the two cases; the packages follow from the contestants' names."""
    known = {
        "lora_jax": (("jax", "safetensors"), jax_settings),
        "safetensors": (("safetensors",), dict),
    }
    theirs = ("peft", "torch", "safetensors"), torch_settings
    return Case(
        name=name,
        title=f"{title} an adapter of {sizes.factors:,} values, float32",
        contestants=tuple(
            Contestant(one, setup, *known.get(one, theirs)) for one, setup in contestants.items()
        ),
        # The bits are the same or they are not.
        tolerance=0.0,
        needed=Needed(bytes=2 * 4 * sizes.factors),
    )


def saving(sizes: Sizes = Sizes()) -> Case:
    """Return the case of saving."""
    contestants = {
        "lora_jax": lambda: our_saving(sizes),
        "PEFT": lambda: peft_saving(sizes),
        "safetensors": lambda: bare_saving(sizes),
    }
    return case("adapter_save", "saving", sizes, contestants)


def loading(sizes: Sizes = Sizes()) -> Case:
    """Return the case of loading."""
    contestants = {
        "lora_jax": lambda: our_loading(sizes),
        "PEFT": lambda: peft_loading(sizes, weights_alone=False),
        "PEFT weights": lambda: peft_loading(sizes, weights_alone=True),
    }
    return case("adapter_load", "loading", sizes, contestants)


def _saving(save: Callable[[Path], Any]) -> Work:
    directory = Path(tempfile.mkdtemp())

    def step() -> Path:
        save(directory)
        return directory

    def read(directory: Path) -> Arrays:
        return _wide(safetensors.numpy.load_file(directory / WEIGHTS))

    _remove_with(step, directory)
    return Work(step, read)


def _remove_with(step: Callable[[], Any], directory: Path) -> None:
    """Remove a directory when nothing can take the step any more."""
    weakref.finalize(step, shutil.rmtree, directory, ignore_errors=True)


def _saved(scratch: Path, found: Plan) -> list[Path]:
    return [
        save_pretrained(scratch / str(n), found, adapters)
        for n, adapters in enumerate(drawn(found))
    ]


def _peft_loaded(sizes: Sizes, directory: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(torch_base(sizes), directory)


def _wide(arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def cases() -> tuple[Case, ...]:
    """Return both cases."""
    return saving(), loading()
