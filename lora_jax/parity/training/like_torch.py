"""optax transformations that do what a PyTorch optimiser, scheduler or clipping does.

Both libraries have the same algorithms under settings that differ: ``docs/optimizers.md`` has
them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ...core.errors import ParityError, raise_all
from ..sides.torch_side import torch
from .update_rules import Adam, RmsProp, Rule, Sgd

# What PyTorch's settings must be, and what to do where they are not.
_REFUSED = {
    "amsgrad": "optax.amsgrad takes the maximum after the bias correction, PyTorch before",
    "maximize": "negate the loss",
}
# Settings that choose an implementation or belong to a scheduler.
_WITHOUT_EFFECT = {"foreach", "fused", "capturable", "differentiable", "initial_lr", "swa_lr"}

_RULES: dict[str, tuple[type, tuple[str, ...]]] = {
    "SGD": (Sgd, ("lr", "momentum", "dampening", "nesterov", "weight_decay")),
    "Adam": (Adam, ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")),
    "AdamW": (Adam, ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")),
    "RMSprop": (RmsProp, ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")),
}

MOMENTS = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "square_avg": "nu",
    "grad_avg": "mu",
    "momentum_buffer": "trace",
}
"""PyTorch's names of moments to optax's."""


def optax_like_torch(
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float | optax.Schedule | None = None,
    group: int | None = None,
) -> optax.GradientTransformation:
    """Return the optax transformation that takes the steps of a PyTorch optimiser.

    For SGD, Adam, AdamW and RMSprop. Learning rate, decay, moments and eps are read from its
    ``param_groups``; what optax calls them, and where the defaults differ, is in
    ``docs/optimizers.md``. Adam's bias correction is more exact than ``optax.adam``'s in float32;
    the state is of the same kind. A fresh optimiser is meant: its moments are not taken over.

    Args:
        optimizer: PyTorch's.
        learning_rate: instead of the group's own; ``optax_schedule_like_torch`` makes it of a
            scheduler.
        group: which of several groups; ``optax.multi_transform`` joins one transformation each.

    Raises:
        ParityError: lists all that optax has no equal for: another class, ``amsgrad``,
            ``maximize``, ``dampening``, groups that differ, a scheduler's rate left out.

    Source: ``torch.optim`` 2.13, ``optax`` 0.2.8.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> tx = optax_like_torch(torch.optim.SGD([weight], lr=0.5, weight_decay=1.0))
    >>> values = {"w": jnp.ones(3)}
    >>> updates, _ = tx.update({"w": jnp.ones(3)}, tx.init(values), values)
    >>> updates["w"]
    Array([-1., -1., -1.], dtype=float32)
    """
    rule = rule_like_torch(optimizer, group)
    problems = []
    if isinstance(rule, Sgd) and rule.dampening:
        problems.append(f"dampening: got {rule.dampening}, wanted 0: optax.trace has none")
    if learning_rate is None and "initial_lr" in optimizer.param_groups[group or 0]:
        problems.append(
            "lr: a scheduler changes it; give learning_rate=optax_schedule_like_torch(scheduler)"
        )
    raise_all(ParityError, f"optax has no {type(optimizer).__name__} like this one", problems)
    rate = optax.scale_by_learning_rate(rule.lr if learning_rate is None else learning_rate)
    decay = [optax.add_decayed_weights(rule.weight_decay)] if rule.weight_decay else []
    match rule:
        case Sgd():
            parts = decay + _momentum(rule.momentum, nesterov=rule.nesterov)
        case Adam():
            adam = [_adam(*rule.betas, rule.eps)]
            parts = adam + decay if rule.decoupled_weight_decay else decay + adam
        case RmsProp():
            scaled = optax.scale_by_stddev if rule.centered else optax.scale_by_rms
            rms = scaled(decay=rule.alpha, eps=rule.eps, eps_in_sqrt=False)
            # optax.rmsprop has the learning rate inside the momentum, PyTorch outside.
            parts = [*decay, rms, *_momentum(rule.momentum)]
        case _:
            raise AssertionError(rule)
    return optax.chain(*parts, rate)


def rule_like_torch(optimizer: torch.optim.Optimizer, group: int | None = None) -> Rule:
    """Return the settings of a PyTorch optimiser as the oracle's rule.

    Raises:
        ParityError: lists what there is no rule for.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> rule_like_torch(torch.optim.SGD([weight], lr=0.5, momentum=0.9))
    Sgd(lr=0.5, momentum=0.9, dampening=0.0, nesterov=False, weight_decay=0.0)
    """
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if type(optimizer) is not getattr(torch.optim, kind, None) or kind not in _RULES:
        raise ParityError(f"no rule for {kind}: got it, wanted one of {', '.join(_RULES)}")
    if group is not None and not 0 <= group < len(groups):
        raise ParityError(f"group: got {group}, wanted less than {len(groups)}")
    rule, names = _RULES[kind]
    settings = groups[group or 0]
    others = [] if group is not None else groups[1:]
    unknown = settings.keys() - {*names, *_REFUSED, *_WITHOUT_EFFECT, "params", "param_names"}
    problems = [f"{name}: {advice}" for name, advice in _REFUSED.items() if settings.get(name)]
    problems += [f"{name}: got {settings[name]!r}, which is not known" for name in sorted(unknown)]
    problems += [
        f"{name}: group {n} has {other[name]!r}, group 0 {settings[name]!r}; give group=, and "
        "join one for each with optax.multi_transform"
        for n, other in enumerate(others, 1)
        for name in names
        if _number(other[name]) != _number(settings[name])
    ]
    raise_all(ParityError, f"there is no rule for this {kind}", problems)
    return rule(**{name: _number(settings[name]) for name in names})


def clip_like_torch(max_norm: float) -> optax.GradientTransformation:
    """Return ``torch.nn.utils.clip_grad_norm_``: ``g · min(1, max_norm / (‖g‖ + 1e-6))``.

    ``optax.clip_by_global_norm`` adds nothing to the norm, which shows where it is small.

    >>> tx = clip_like_torch(1.0)
    >>> tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(None))[0]["w"].tolist()
    [0.599999..., 0.799999...]
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def accumulate_like_torch(
    optimizer: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
    """Return an optimiser that steps once in ``every`` gradients, with their sum.

    That is what ``backward`` without ``zero_grad`` gives PyTorch's. ``optax.MultiSteps`` takes
    the mean unless it is told otherwise; PyTorch does where the loss is divided by ``every``.

    >>> tx = accumulate_like_torch(optax.sgd(1.0), 2)
    >>> ones = {"w": jnp.ones(2)}
    >>> with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
    ...     _, state = tx.update(ones, tx.init(ones), ones)
    ...     tx.update(ones, state, ones)[0]["w"]
    Array([-2., -2.], dtype=float32)
    """
    both: Any = optax.MultiSteps(optimizer, every, use_grad_mean=False).gradient_transformation()
    return optax.GradientTransformation(both.init, both.update)


def optax_schedule_like_torch(
    scheduler: torch.optim.lr_scheduler.LRScheduler, group: int = 0
) -> optax.Schedule:
    """Return the learning rate of a PyTorch scheduler as a function of the number of steps.

    For LinearLR, StepLR, MultiStepLR, ExponentialLR and CosineAnnealingLR, and for the constant,
    linear and cosine schedules with warm-up of ``transformers``. The step that optax counts from 0
    is the one before the scheduler's first ``step()``.

    Args:
        scheduler: PyTorch's, in whatever state; only its settings are read.
        group: whose learning rate, where groups start with different ones.

    Raises:
        ParityError: another kind of scheduler.

    Source: ``torch.optim.lr_scheduler`` 2.13, ``transformers`` 4.57.

    >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.8)
    >>> schedule = optax_schedule_like_torch(torch.optim.lr_scheduler.StepLR(sgd, 3, gamma=0.5))
    >>> [round(float(schedule(step)), 2) for step in range(7)]
    [0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2]
    """
    kind = type(scheduler).__name__
    settings = dict(vars(scheduler))
    if kind == "LambdaLR":
        made = settings["lr_lambdas"][group]
        kind = getattr(getattr(made, "func", made), "__name__", "")
        settings |= getattr(made, "keywords", {})
    if kind not in _FACTORS:
        wanted = ", ".join(name for name in _FACTORS if not name.startswith("_"))
        raise ParityError(f"no schedule for {kind}: wanted one of {wanted}, or with warm-up")
    base, factor = float(scheduler.base_lrs[group]), _FACTORS[kind]

    def schedule(count: Any) -> Any:
        step = jnp.asarray(count).astype(jnp.result_type(float))
        return base * factor(step, settings, base)

    return schedule


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Return ``optax.scale_by_adam`` with the bias correction as exact as PyTorch's.

    optax subtracts ``β₂ᵗ`` from 1 in float32, where its rounding counts a thousandfold.
    """
    averages = optax.scale_by_adam(b1, b2, eps=eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = averages.update(updates, state, params)
        count = state.count.astype(jnp.float32)
        first, second = (-jnp.expm1(count * (math.log(b) if b else -math.inf)) for b in (b1, b2))

        def move(mu: Any, nu: Any) -> Any:
            mean, square = mu / first.astype(mu.dtype), nu / second.astype(nu.dtype)
            return mean / (jnp.sqrt(square) + eps)

        return jax.tree.map(move, state.mu, state.nu), state

    return optax.GradientTransformation(averages.init, update)


def _momentum(momentum: float, *, nesterov: bool = False) -> list[optax.GradientTransformation]:
    return [optax.trace(momentum, nesterov)] if momentum else []


def _number(setting: Any) -> Any:
    """Return a setting as floats; PyTorch takes integers and, for some, tensors."""
    if isinstance(setting, tuple):
        return tuple(map(_number, setting))
    return setting if isinstance(setting, bool) else float(setting)


def _linear(t: Any, s: Mapping[str, Any], base: float) -> Any:
    start, end = s["start_factor"], s["end_factor"]
    return start + (end - start) * jnp.minimum(t / s["total_iters"], 1.0)


def _multi_step(t: Any, s: Mapping[str, Any], base: float) -> Any:
    passed = sum(
        jnp.where(t >= milestone, float(times), 0.0) for milestone, times in s["milestones"].items()
    )
    return s["gamma"] ** passed


def _cosine(t: Any, s: Mapping[str, Any], base: float) -> Any:
    least = s["eta_min"] / base
    return least + (1 - least) * (1 + jnp.cos(jnp.pi * t / s["T_max"])) / 2


def _warmed_up(after: Callable[[Any, Mapping[str, Any]], Any]) -> Callable[..., Any]:
    def factor(t: Any, s: Mapping[str, Any], base: float) -> Any:
        warmup = s["num_warmup_steps"]
        return jnp.where(t < warmup, t / max(1, warmup), after(t - warmup, s))

    return factor


def _left(t: Any, s: Mapping[str, Any]) -> Any:
    return jnp.maximum(0.0, 1 - t / _decaying(s))


def _half_waves(t: Any, s: Mapping[str, Any]) -> Any:
    angle = 2 * jnp.pi * s["num_cycles"] * t / _decaying(s)
    return jnp.maximum(0.0, (1 + jnp.cos(angle)) / 2)


def _decaying(s: Mapping[str, Any]) -> int:
    return max(1, s["num_training_steps"] - s["num_warmup_steps"])


# Of the learning rate, from the step, the scheduler's settings and the rate it starts from.
_FACTORS: dict[str, Callable[[Any, Mapping[str, Any], float], Any]] = {
    "LinearLR": _linear,
    "StepLR": lambda t, s, base: s["gamma"] ** jnp.floor(t / s["step_size"]),
    "MultiStepLR": _multi_step,
    "ExponentialLR": lambda t, s, base: s["gamma"] ** t,
    "CosineAnnealingLR": _cosine,
    "_get_constant_schedule_with_warmup_lr_lambda": _warmed_up(lambda t, s: 1.0),
    "_get_linear_schedule_with_warmup_lr_lambda": _warmed_up(_left),
    "_get_cosine_schedule_with_warmup_lr_lambda": _warmed_up(_half_waves),
}
