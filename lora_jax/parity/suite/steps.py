"""Levels 3 and 4: one step and ten of every optimiser, schedules, and a trajectory of 150 steps.

Imports without PyTorch; the checks need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from ..reports.checks import Check
from ..tensors import Tensors
from ..training.stepping import optimizer_step
from ..training.trajectories import Trajectory, trajectory
from ..verdicts import UNIT_ROUNDOFF, TensorVerdict, judge
from . import lora_oracle
from .cases import random_case

SHAPE = (9, 33, 6, 5)
STEPS = 10
TRAJECTORY = 150


@dataclass(frozen=True)
class Recipe:
    """An optimiser in PyTorch, with what is done around it.

    Args:
        name: of the class in ``torch.optim``.
        settings: its keywords.
        max_norm: of PyTorch's clipping.
        warmup: steps of the linear warm-up of ``transformers``, which ends after ``STEPS``.
        accumulate: how many gradients make a step.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_norm: float | None = None
    warmup: int | None = None
    accumulate: int = 1

    def torch(self, parameters: Sequence[Any]) -> Any:
        """Return PyTorch's optimiser."""
        import torch

        return getattr(torch.optim, self.name)(parameters, **self.settings)

    def scheduler(self, optimizer: Any) -> Any:
        """Return the scheduler of PyTorch's optimiser; None where there is none."""
        from torch.optim.lr_scheduler import LambdaLR

        if self.warmup is None:
            return None
        # Spelt out, so that the check is not of our reading of `transformers`.
        rise, fall = self.warmup, STEPS - self.warmup
        return LambdaLR(optimizer, lambda t: min(t / rise, max(0.0, (STEPS - t) / fall)))

    def optax(self) -> optax.GradientTransformation:
        """Return what ``like_torch`` makes of all this."""
        import torch

        from ..training import like_torch

        rate = None
        if self.warmup is not None:
            peak, rise = self.settings["lr"], self.warmup
            rate = optax.join_schedules(
                [
                    optax.linear_schedule(0.0, peak, rise),
                    optax.linear_schedule(peak, 0.0, STEPS - rise),
                ],
                [rise],
            )
        made = self.torch([torch.nn.Parameter(torch.ones(1))])
        tx = like_torch.optax_like_torch(made, learning_rate=rate)
        if self.max_norm is not None:
            tx = optax.chain(like_torch.clip_like_torch(self.max_norm), tx)
        return like_torch.accumulate_like_torch(tx, self.accumulate) if self.accumulate > 1 else tx


_ADAMW = dict(lr=1e-2, weight_decay=0.1)

RECIPES = {
    "SGD": Recipe("SGD", dict(lr=0.1)),
    "SGD with decay": Recipe("SGD", dict(lr=0.1, weight_decay=0.1)),
    "momentum": Recipe("SGD", dict(lr=0.1, momentum=0.9)),
    "Nesterov": Recipe("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
    "AdamW": Recipe("AdamW", _ADAMW),
    "Adam with L2": Recipe("Adam", dict(lr=1e-2, weight_decay=0.1)),
    "RMSprop": Recipe("RMSprop", dict(lr=1e-2)),
    "RMSprop centred, momentum": Recipe(
        "RMSprop", dict(lr=1e-2, centered=True, momentum=0.9, weight_decay=0.1)
    ),
    # A small norm, so that what PyTorch adds to it is seen, and steps that are not.
    "clipping": Recipe("SGD", dict(lr=100.0, momentum=0.9), max_norm=1e-3),
    "AdamW, clipped, warm-up": Recipe("AdamW", _ADAMW, max_norm=1.0, warmup=3),
    "accumulation of 4": Recipe("AdamW", _ADAMW, accumulate=4),
}


def draw(steps: int, seed: int, size: float = 1.0) -> tuple[Tensors, list[Tensors]]:
    """Return A and B of a LoRA linear, B not zero, and float32 gradients of a loss for each step.

    The gradients are those of the oracle on new x and g, and grow from step to step.
    """
    case = random_case(SHAPE, seed)
    lora_oracle.refuse_vacuous(case)
    gradients = []
    for step in range(steps):
        other = random_case(SHAPE, seed + 1000 * (step + 1))
        truth = lora_oracle.truth(replace(case, x=other.x, g=other.g * size * (step + 1) / steps))
        gradients.append({n: truth[f"d{n.upper()}"].astype(np.float32) for n in ("a", "b")})
    return {"a": case.a, "b": case.b}, gradients


def step_check(
    recipe: Recipe, steps: int, seed: int, *, tx: optax.GradientTransformation | None = None
) -> tuple[TensorVerdict, ...]:
    """Hold optax to PyTorch and both to the truth after each of these steps.

    Args:
        recipe: what PyTorch does.
        steps: how many.
        seed: of values and gradients.
        tx: instead of what ``like_torch`` makes of the recipe.
    """
    # Small gradients where they are clipped at a small norm, so that 1e-6 counts beside it.
    size = 1e-4 if recipe.max_norm and recipe.max_norm < 0.1 else 0.1
    values, gradients = draw(steps * recipe.accumulate, seed, size)
    return optimizer_step(
        recipe.optax() if tx is None else tx,
        recipe.torch,
        values,
        gradients,
        scheduler=recipe.scheduler,
        max_norm=recipe.max_norm,
        accumulate=recipe.accumulate,
    )


# PyTorch's schedulers, and the learning rate of step t in units of the first, as defined.
SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "LinearLR": (
        dict(start_factor=0.25, end_factor=0.75, total_iters=7),
        lambda t: 0.25 + 0.5 * min(t, 7) / 7,
    ),
    "StepLR": (dict(step_size=4, gamma=0.3), lambda t: 0.3 ** (t // 4)),
    "MultiStepLR": (
        dict(milestones=[3, 8, 8], gamma=0.3),
        lambda t: 0.3 ** ((t >= 3) + 2 * (t >= 8)),
    ),
    "ExponentialLR": (dict(gamma=0.9), lambda t: 0.9**t),
    "CosineAnnealingLR": (
        dict(T_max=9, eta_min=0.002),
        lambda t: 0.2 + 0.8 * (1 + math.cos(math.pi * t / 9)) / 2,
    ),
    "get_linear_schedule_with_warmup": (
        dict(num_warmup_steps=4, num_training_steps=15),
        lambda t: min(t / 4, max(0.0, (15 - t) / 11)),
    ),
    "get_cosine_schedule_with_warmup": (
        dict(num_warmup_steps=4, num_training_steps=15),
        lambda t: t / 4 if t < 4 else (1 + math.cos(math.pi * min(1, (t - 4) / 11))) / 2,
    ),
    "get_constant_schedule_with_warmup": (
        dict(num_warmup_steps=4),
        lambda t: min(1.0, t / 4),
    ),
}
RATE = 0.01


def scheduled(name: str) -> tuple[Any, Any]:
    """Return PyTorch's optimiser and scheduler of this name."""
    import torch

    settings, _ = SCHEDULES[name]
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)
    if name.startswith("get_"):
        import transformers

        return sgd, getattr(transformers, name)(sgd, **settings)
    return sgd, getattr(torch.optim.lr_scheduler, name)(sgd, **settings)


def schedule_check(name: str, seed: int) -> Iterator[TensorVerdict]:
    """Hold a schedule to PyTorch's scheduler over 15 steps, and both to its definition."""
    from ..training.like_torch import optax_schedule_like_torch

    sgd, scheduler = scheduled(name)
    ours, theirs = optax_schedule_like_torch(scheduler), []
    steps = range(15)
    for _ in steps:
        theirs.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    truth = np.array([RATE * SCHEDULES[name][1](t) for t in steps])
    got = np.array([ours(jnp.asarray(t)) for t in steps])
    unit = UNIT_ROUNDOFF["float32"]
    yield judge("rate", got, np.array(theirs), truth, unit_roundoff=unit, cond=4.0, independent=1)


def lora_trajectory(
    seed: int,
    steps: int = TRAJECTORY,
    *,
    lr: float = 1e-3,
    tx: optax.GradientTransformation | None = None,
    **options: Any,
) -> Trajectory:
    """Train A and B of a small LoRA network with AdamW in both, the weights frozen.

    Args:
        seed: of weights and data.
        steps: how many.
        lr: the learning rate of both.
        tx: instead of ``optax_like_torch`` of PyTorch's optimiser.
        options: of ``trajectory``.
    """
    import torch

    from ..training.jax_runs import jax_run
    from ..training.like_torch import optax_like_torch
    from ..training.torch_runs import torch_run

    trained, frozen, batches = _network(seed)

    def make(parameters: Sequence[Any]) -> Any:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)

    tx = optax_like_torch(make([torch.nn.Parameter(torch.ones(1))])) if tx is None else tx
    theirs = partial(torch_run, _loss, make, trained, batches, frozen=frozen)
    ours = jax_run(_loss, tx, trained, batches, frozen=frozen)
    return trajectory(ours, theirs(), steps=steps, truth=theirs(wide=True), **options)


def trajectory_check(seed: int) -> Iterator[TensorVerdict]:
    """Hold 150 AdamW steps to the noise band."""
    yield lora_trajectory(seed).as_verdict("150 AdamW steps")


TRAJECTORIES: dict[str, Callable[[int], Trajectory]] = {"LoRA network, AdamW": lora_trajectory}
"""For the report: ``to_dict`` of each is what ``Report.trajectories`` holds."""


def _network(seed: int) -> tuple[Tensors, Tensors, list[Tensors]]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> Any:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    frozen = {"w1": normal(24, 48, std=0.2), "w2": normal(48, 10, std=0.14)}
    low_rank = {"a": 0.2, "b": 0.1}
    shapes = {"a1": (24, 6), "b1": (6, 48), "a2": (48, 6), "b2": (6, 10)}
    trained = {name: normal(*shape, std=low_rank[name[0]]) for name, shape in shapes.items()}
    wanted, batches = normal(24, 10, std=0.3), []
    for _ in range(8):
        x = normal(32, 24, std=1.0)
        batches.append({"x": x, "wanted": np.tanh(x @ wanted)})
    return trained, frozen, batches


def _loss(trained: Any, frozen: Any, batch: Any) -> Any:
    """Return the mean square error; methods and operators that both libraries have."""
    scale = 16 / 6
    hidden = _layer(batch["x"], frozen["w1"], trained["a1"], trained["b1"], scale)
    hidden = hidden * abs(hidden) / (1 + abs(hidden))
    y = _layer(hidden, frozen["w2"], trained["a2"], trained["b2"], scale)
    return ((y - batch["wanted"]) ** 2).mean()


def _layer(x: Any, w: Any, a: Any, b: Any, scale: float) -> Any:
    return x @ w + scale * (x @ a @ b)


def _checks() -> Iterator[Check]:
    torch = ("torch",)
    for name, recipe in RECIPES.items():
        if recipe.warmup is None:  # whose first step is none
            yield Check(f"{name}/one step", 3, partial(step_check, recipe, 1), torch)
        yield Check(f"{name}/ten steps", 4, partial(step_check, recipe, STEPS), torch)
    for name in SCHEDULES:
        needs = ("torch", "transformers") if name.startswith("get_") else torch
        yield Check(f"{name}/schedule", 3, partial(schedule_check, name), needs)
    yield Check("AdamW/trajectory of 150 steps", 4, trajectory_check, torch, slow=True)


CHECKS = tuple(_checks())
