"""The adapters that PyTorch draws from a seed: PEFT's and the reference's, bit for bit, in numpy.

Making a layer draws more than what is kept: every ``nn.Linear`` that PEFT makes draws its weight,
and A is then drawn once more. The numbers of a module so depend on those before it, and on the
order in which PyTorch visits them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ...core import paths
from ...core.adapter import Adapters
from ...core.errors import ConfigError, raise_all
from ...core.torch_rng import TorchGenerator
from ...peft import tensors
from ...peft.keys import PREFIX, Names, Slot, slots
from ...rewrite import Plan

__all__ = ["TorchGenerator", "init_like_peft", "init_like_reference"]

_HEADING = "PyTorch's adapters for this plan are not known bit for bit"


def init_like_peft(
    plan: Plan,
    seed: int,
    modules: Iterable[str] | None = None,
    *,
    names: Names = paths.module_of,
) -> dict[str, Any]:
    """Return the adapters of ``torch.manual_seed(seed); get_peft_model(model, config)``.

    Of every module PEFT makes two ``nn.Linear`` (or convolutions), which draw A and B, and then
    draws A again and sets B to zero. With ``init_lora_weights=False`` the first draws are kept.

    Args:
        plan: of the model, with PEFT's configuration.
        seed: as given to ``torch.manual_seed``.
        modules: the names of the model's modules in PyTorch's order, others among them:
            ``[name for name, _ in model.named_modules()]``. Needed where more than one weight is
            adapted: a pytree's order is the alphabet's, in which layer 10 comes before layer 2.
        names: the PyTorch module name of a path, as when saving.

    Raises:
        ConfigError: lists what is drawn from normal numbers, modules that the order does not
            name, and what else is not known.

    Source: PEFT 0.21.2, as it was seen to behave.

    >>> import jax.numpy as jnp
    >>> from lora_jax import LoraConfig, plan as make_plan
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> config = LoraConfig(r=2, target_modules=["w"])
    >>> found = make_plan(lambda params, x: x @ params["w"], params, config, x)
    >>> adapters = init_like_peft(found, seed=0, modules=["w"])
    >>> adapters["w"].a.shape, bool((adapters["w"].b == 0).all())
    ((4, 2), True)
    """
    kept = plan.config.init_lora_weights
    problems = [
        f"{leaf.name}: its rows are looked up, so that PyTorch draws normal numbers"
        for leaf in plan.adapted
        if leaf.looked_up
    ]
    if kept not in (True, False):
        problems.append(f"init_lora_weights: got {kept!r}, wanted True or False")
    raise_all(ConfigError, _HEADING, problems)
    found = tensors.encode(plan, plan.init(jax.random.key(0)), names)
    generator = TorchGenerator(seed)
    for a, b in _in_order(plan, modules, names):
        for slot in (a, b):
            found[slot.key] = generator.kaiming_uniform(slot.shape)
        if kept:
            found[a.key] = generator.kaiming_uniform(a.shape)
            found[b.key] = np.zeros(b.shape, np.float32)
    return tensors.decode(plan, found, names)


def init_like_reference(
    plan: Plan,
    seed: int,
    modules: Iterable[str] | None = None,
    *,
    names: Names = paths.module_of,
    fan_in: str = "rank",
) -> Adapters:
    """Return the adapters of ``torch.manual_seed(seed); replace_linear_with_lora(model, …)``.

    The layer of ``lora_torch_ref`` draws A once and nothing else.

    Args:
        plan: of the model.
        seed: as given to ``torch.manual_seed``.
        modules: as in ``init_like_peft``.
        names: as in ``init_like_peft``.
        fan_in: ``"rank"`` draws on ``(in, r)``, the layer's default ``a_init="fan_in_rank"``;
            ``"input"`` on ``(r, in)``, its ``"fan_in_input"``.

    Raises:
        ConfigError: lists what is no matrix, and modules that the order does not name.
    """
    draws: dict[str, Callable[[TorchGenerator, int, int], Any]] = {
        "rank": lambda generator, r, size: generator.kaiming_uniform((size, r)).T,
        "input": lambda generator, r, size: generator.kaiming_uniform((r, size)),
    }
    problems = [
        f"{leaf.name}: no layer's matrix"
        for leaf in plan.adapted
        if leaf.looked_up or leaf.window or leaf.dora
    ]
    if fan_in not in draws:
        problems.append(f"fan_in: got {fan_in!r}, wanted one of {', '.join(map(repr, draws))}")
    raise_all(ConfigError, _HEADING, problems)
    found = tensors.encode(plan, plan.init(jax.random.key(0)), names)
    generator = TorchGenerator(seed)
    for a, b in _in_order(plan, modules, names):
        found[a.key] = np.ascontiguousarray(draws[fan_in](generator, *a.shape))
        found[b.key] = np.zeros(b.shape, np.float32)
    return tensors.decode(plan, found, names)


def _in_order(plan: Plan, modules: Iterable[str] | None, names: Names) -> list[tuple[Slot, Slot]]:
    """Return the slots of A and B of every module, in PyTorch's order."""
    pairs: dict[str, list[Slot]] = {}
    for slot in slots(plan, names):
        if slot.part in ("a", "b"):
            module = slot.key.removeprefix(PREFIX).rpartition(".lora_")[0]
            pairs.setdefault(module, []).append(slot)
    order: Sequence[str] = list(pairs) if modules is None else list(modules)
    if modules is None and len(pairs) > 1:
        wanted = "the modules in PyTorch's order, since each draws from where the last stopped"
        raise ConfigError(f"modules: got None, wanted {wanted}: {', '.join(pairs)}")
    known = set(order)
    missing = [f"{name}: adapted, but not among the modules" for name in pairs if name not in known]
    raise_all(ConfigError, _HEADING, missing)
    return [(pairs[name][0], pairs[name][1]) for name in order if name in pairs]
