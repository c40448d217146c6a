"""Freeze a model, put LoRA beside its linear layers, and find what is left to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar, Unpack

from torch import nn

from .layers import LinearWithLoRA, LoRAOptions

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Take every parameter out of training and return the module.

    Call it before ``replace_linear_with_lora``: afterwards it would freeze A and B too.

    >>> any(p.requires_grad for p in freeze(nn.Linear(10, 5)).parameters())
    False
    """
    return module.requires_grad_(False)


def replace_linear_with_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    *,
    exclude: str | Iterable[str] = (),
    layer: Callable[..., LinearWithLoRA] = LinearWithLoRA,
    **options: Unpack[LoRAOptions],
) -> list[str]:
    """Wrap every ``nn.Linear`` in the model, in place, and return the names of the places.

    A layer that stands in several places gets one wrapper for all of them, or none if one of its
    names is excluded. Layers wrapped by an earlier call are left as they are, and so is the
    whole model if this call raises.

    Args:
        model: any module that holds linear layers, at any depth.
        rank: see ``LoRALayer``.
        alpha: see ``LoRALayer``.
        exclude: names of layers to leave out, matched exactly or as a ``.suffix``.
        layer: ``LinearWithLoRA``, ``DoRALinear``, or what else builds one.
        options: see ``LinearWithLoRA``.

    Raises:
        ValueError: the model is itself an ``nn.Linear``; it has none to wrap; an excluded name
            matches nothing; or as for ``layer``.

    Source: LoRA, arXiv 2106.09685, section 4.2.

    >>> model = freeze(nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> replace_linear_with_lora(model, 4, 8, exclude=["2"])
    ['0']
    >>> list(trainable_parameters(model))
    ['0.lora.A', '0.lora.B']
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself an nn.Linear, which has no parent to replace it in: "
            "use LinearWithLoRA(model, rank, alpha)"
        )
    linears = _linears_by_name(model)
    left_out = _excluded(linears, [exclude] if isinstance(exclude, str) else list(exclude))
    chosen = {name: linear for name, linear in linears.items() if linear not in left_out}
    if not chosen and not any(isinstance(module, LinearWithLoRA) for module in model.modules()):
        why = f"exclude leaves out all of {', '.join(linears)}" if linears else "the model has none"
        raise ValueError(f"there is no nn.Linear to replace: {why}")
    wrappers = _wrap_once(chosen, lambda linear: layer(linear, rank, alpha, **options))
    for name, linear in chosen.items():
        model.set_submodule(name, wrappers[linear])
    return list(chosen)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive a gradient, by name: what an optimiser is given.

    >>> model = freeze(nn.Sequential(nn.Linear(10, 8)))
    >>> names = replace_linear_with_lora(model, rank=2, alpha=4)
    >>> sum(p.numel() for p in trainable_parameters(model).values())
    36
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _linears_by_name(model: nn.Module) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and not isinstance(modules[name.rpartition(".")[0]], LinearWithLoRA)
    }


def _excluded(linears: dict[str, nn.Linear], exclude: list[str]) -> set[nn.Linear]:
    hits = {e: [path for path in linears if f".{path}".endswith(f".{e}")] for e in exclude}
    if misses := [e for e, paths in hits.items() if not paths]:
        raise ValueError(
            f"exclude names {', '.join(map(repr, misses))}, which match no nn.Linear to replace: "
            f"{', '.join(linears) or 'the model has none'}"
        )
    return {linears[path] for paths in hits.values() for path in paths}


def _wrap_once(
    linears: dict[str, nn.Linear], layer: Callable[[nn.Linear], LinearWithLoRA]
) -> dict[nn.Linear, LinearWithLoRA]:
    wrappers = {}
    for name, linear in linears.items():
        try:
            wrappers[linear] = wrappers.get(linear) or layer(linear)
        except ValueError as error:
            error.add_note(f"while wrapping {name!r}")
            raise
    return wrappers
