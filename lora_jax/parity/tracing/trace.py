"""``trace``: where two models part, by taps at every module, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import tensors as names
from ..compare import AGREEMENT, Comparison, compare, is_floating
from ..sides import jax_side
from ..tensors import Mapped, To
from ..verdicts import TensorVerdict, Verdict, worst
from . import jax_taps
from .taps import INPUT, OUTPUT, Pair, Unpaired, pair

FORWARD, BACKWARD = "forward", "backward"
_KEY = "tap:"


@dataclass(frozen=True)
class Held:
    """One tensor of both frameworks, compared.

    Args:
        verdict: what the comparison says.
        apart: how far the two float64 runs are from each other, as relL2.
    """

    verdict: TensorVerdict
    apart: float

    @property
    def diverged(self) -> bool:
        """Whether one of the two is wrong."""
        return self.verdict.verdict in (Verdict.MISMATCH, Verdict.BIASED)

    @property
    def another_function(self) -> bool:
        """Whether the difference is there in float64, too."""
        return self.apart > AGREEMENT

    @property
    def rel_l2(self) -> float:
        """How far apart the two are: in float64, or in their own dtype where only that differs."""
        return self.apart if self.another_function else self.verdict.jax

    @property
    def why(self) -> str:
        """Whether it is the function or its rounding that differs."""
        if self.another_function:
            return "in float64 too: another function, not rounding"
        return f"in float64 they agree to {self.apart:.0e}: {self.verdict.why}"

    def __str__(self) -> str:
        said = str(self.verdict.verdict)
        return f"{said} {self.rel_l2:.0e}" if self.diverged else said


@dataclass(frozen=True)
class Tap:
    """One tensor that enters or leaves a module, and the loss's gradient there.

    Args:
        name: the module's in JAX, with the call's number where it is called several times.
        torch: the module's in PyTorch.
        kind: ``"input"`` or ``"output"``.
        forward: its value.
        backward: the gradient; that of an input through this module alone.
    """

    name: str
    torch: str
    kind: str
    forward: Held
    backward: Held

    def __str__(self) -> str:
        return f"the {self.kind} of {self.name}"


@dataclass(frozen=True)
class Divergence:
    """The first tensor in the order of execution that differs.

    Args:
        name: the module's, or that of an output of the model or of the gradient of an input.
        direction: ``"forward"`` or ``"backward"``.
        kind: ``"input"`` or ``"output"`` of the module; empty outside of modules.
        held: the comparison.
        where: what agrees, and so where to look.
    """

    name: str
    direction: str
    kind: str
    held: Held
    where: str

    def __str__(self) -> str:
        kind = f" at its {self.kind}" if self.kind else ""
        apart = f"relL2 {self.held.rel_l2:.0e}"
        return f"{self.name}: {self.direction}{kind}, {apart}; {self.where}; {self.held.why}"


@dataclass(frozen=True)
class Trace:
    """What ``trace`` found.

    Args:
        taps: what was compared inside the model, in JAX's order of execution.
        outputs: the model's outputs.
        gradients: the gradients of the model's inputs, weights included.
        unpaired: the taps that were not compared, and why.
    """

    taps: tuple[Tap, ...]
    outputs: tuple[Held, ...]
    gradients: tuple[Held, ...]
    unpaired: tuple[Unpaired, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all verdicts."""
        inside = [one for tap in self.taps for one in (tap.forward, tap.backward)]
        return worst(one.verdict for one in (*inside, *self.outputs, *self.gradients))

    @property
    def ok(self) -> bool:
        """Whether every tensor is ``EXACT`` or ``ORDER_ONLY``."""
        return self.verdict.ok

    @property
    def first(self) -> Divergence | None:
        """The first divergence: forward in the order of execution, then backward from the loss."""
        return (
            _first_forward(self.taps)
            or self._first_end(self.outputs, FORWARD, "every tap agrees: see what follows the last")
            or _first_backward(self.taps)
            or self._first_end(self.gradients, BACKWARD, "the gradient at every tap agrees")
        )

    def _first_end(self, ends: Sequence[Held], direction: str, where: str) -> Divergence | None:
        where = where if self.taps else "no tap has a partner (see names=)"
        found = (one for one in ends if one.diverged)
        return next(
            (Divergence(one.verdict.name, direction, "", one, where) for one in found), None
        )

    def __str__(self) -> str:
        """Return the first divergence, a table of all taps, and those without a partner."""
        said = str(self.first or "none")
        if self.first is None and not self.ok:
            said = f"none, but the comparison is {self.verdict}"
        lines = [f"first divergence: {said}", "", *_table(self)]
        if self.unpaired:
            lines += ["", "not compared:", *(f"  {one}" for one in self.unpaired)]
        return "\n".join(lines)


def trace(
    jax_fn: Any,
    torch_module: Any,
    inputs: Mapping[str, Any],
    *,
    mapping: Mapped | None = None,
    names: Mapped | None = None,
    outputs: Mapping[str, To | str] | None = None,
    seed: int = 0,
) -> Trace:
    """Hold a JAX model and its PyTorch twin to each other at every module: find where they part.

    What enters and leaves each module is compared as ``compare`` compares outputs, and so is the
    gradient of the loss ``Σ⟨g, output⟩`` there, with the same g on both sides. In JAX the taps
    are the modules of Linen and NNX, and what a function passes through ``tap``. Jitted functions
    are run without ``jit``, loops as loops, so that a scanned layer has a tap for each step.
    Numbers that only mask, as ``-inf`` does, count as equal.

    Args:
        jax_fn: a Linen module, called with ``params`` and the arguments; an NNX module, called
            with the arguments, and with ``params`` where they are not its own; a PyTorch module
            that ``from_torch`` is to run in JAX; or a function of the inputs.
        torch_module: the PyTorch module; its own weights are used where ``inputs`` has none.
        inputs: numpy arrays or pytrees of them by keyword, weights included.
        mapping: PyTorch's names and layouts of the inputs by JAX's, as in ``compare``.
        names: PyTorch's name of a tap by JAX's, as a mapping or a function. A module that is
            called several times is ``"name[0]"``, ``"name[1]"``, …; a ``To`` gives the layout of
            an output that differs. Names that are alike may be left out.
        outputs: PyTorch's names and layouts of the outputs by JAX's, as in ``compare``.
        seed: of the cotangents g.

    Raises:
        ParityError: names or shapes do not fit, the PyTorch module is random, or a tap is where
            no value can be read, as inside a ``while_loop`` or a ``custom_vjp``; lists them all.
        ImportError: PyTorch is not installed.

    >>> import torch, jax.numpy as jnp
    >>> from lora_jax.parity import tap
    >>> twin = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Softmax(dim=-1))
    >>> def wrong(input):
    ...     x = tap("0", jnp.tanh(input) * 1.01)
    ...     return tap("1", jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True))
    >>> print(trace(wrong, twin, {"input": np.linspace(-1, 1, 6, dtype="f4").reshape(2, 3)}).first)
    0: forward at its output, relL2 1e-02; it is the first tap; in float64 too: another function,
    not rounding
    """
    from . import torch_taps

    fn, theirs = jax_taps.function(jax_fn), torch_taps.ModuleFn(torch_module)
    leaves = jax_side.leaves(inputs)
    ours = jax_taps.places(fn, inputs)
    found, unpaired = pair(ours, torch_taps.places(theirs, _given(inputs, leaves, mapping)), names)
    keys = {one: f"{_KEY}{n}" for n, one in enumerate(found)}
    # In the inputs' own dtype, so that they do not change what the comparison takes it to be.
    dtype = next((leaf.dtype for leaf in leaves.values() if is_floating(leaf)), np.float32)
    zeros = {key: np.zeros(ours[one.ours], dtype) for one, key in keys.items()}
    layouts = {key: replace(one.to, name=key) for one, key in keys.items()}
    held = compare(
        jax_taps.tapped(fn, {one.ours: key for one, key in keys.items()}),
        torch_taps.TappedModule(torch_module, {one.theirs: key for one, key in keys.items()}),
        {**inputs, **zeros},
        mapping=lambda path: layouts[path] if path in layouts else _to(mapping, path),
        outputs={**(outputs or {}), **layouts},
        seed=seed,
    )
    return _trace(held, keys, unpaired, [f"d{path}" for path in leaves])


def _to(mapping: Mapped | None, path: str) -> To:
    return names.to(mapping, path)


def _given(inputs: Mapping[str, Any], leaves: Mapping[str, Any], mapping: Mapped | None) -> Any:
    """Return the inputs as PyTorch's keywords."""
    names.check(mapping, list(leaves))
    to = {path: names.to(mapping, path) for path in leaves}
    return {one.name: one.there(leaves[path]) for path, one in to.items()}


def _trace(
    held: Comparison, keys: Mapping[Pair, str], unpaired: Sequence[Unpaired], derived: Sequence[str]
) -> Trace:
    verdicts = {one.name: Held(one, held.agreement[one.name]) for one in held.tensors}

    def take(key: str, name: str) -> Held:
        found = verdicts.pop(key)
        return replace(found, verdict=replace(found.verdict, name=name))

    taps = []
    for one, key in keys.items():
        place = f"{one.label}: {one.ours.kind}"
        forward, backward = take(key, place), take(f"d{key}", f"{place}, gradient")
        taps.append(Tap(one.label, one.to.name, one.ours.kind, forward, backward))
    gradients = tuple(verdicts.pop(name) for name in derived if name in verdicts)
    return Trace(tuple(taps), tuple(verdicts.values()), gradients, tuple(unpaired))


def _first_forward(taps: Sequence[Tap]) -> Divergence | None:
    at = next((n for n, tap in enumerate(taps) if tap.forward.diverged), None)
    if at is None:
        return None
    tap, before = taps[at], taps[:at]
    if tap.kind == OUTPUT and _same(tap, before):
        where = f"its inputs agree{_inside(tap, before)}"
    elif before:
        where = f"all before it agrees, {before[-1]} too: see what stands between"
    else:
        where = "it is the first tap"
    return Divergence(tap.name, FORWARD, tap.kind, tap.forward, where)


def _first_backward(taps: Sequence[Tap]) -> Divergence | None:
    taps = taps[::-1]
    at = next((n for n, tap in enumerate(taps) if tap.backward.diverged), None)
    if at is None:
        return None
    tap, after = taps[at], taps[:at]
    if tap.kind == INPUT and _same(tap, after):
        where = f"the gradient at its output agrees{_inside(tap, after)}: see its backward"
    elif after:
        where = f"the gradients after it agree, at {after[-1]} too: see what stands between"
    else:
        where = "no tap stands between it and the loss"
    return Divergence(tap.name, BACKWARD, tap.kind, tap.backward, where)


def _same(tap: Tap, met: Sequence[Tap]) -> bool:
    """Tell whether the other end of the same call is among the taps already met."""
    return any(one.name == tap.name and one.kind != tap.kind for one in met)


def _inside(tap: Tap, met: Sequence[Tap]) -> str:
    name = tap.name.partition("[")[0]
    return ", as does all inside it" if any(o.name.startswith(f"{name}.") for o in met) else ""


def _table(found: Trace) -> list[str]:
    """Return a line for each module's call, then the model's outputs and gradients."""
    rows = [("tap", "torch", "input", "output", "d output", "d input")]
    for name, torch in dict.fromkeys((tap.name, tap.torch) for tap in found.taps):
        own = [tap for tap in found.taps if (tap.name, tap.torch) == (name, torch)]
        enters, leaves = ([tap for tap in own if tap.kind == kind] for kind in (INPUT, OUTPUT))
        cells = (
            _worst([tap.forward for tap in enters]),
            _worst([tap.forward for tap in leaves]),
            _worst([tap.backward for tap in leaves]),
            _worst([tap.backward for tap in enters]),
        )
        rows.append((name, torch, *cells))
    rows += [(one.verdict.name, "", "", str(one), "", "") for one in found.outputs]
    rows += [(one.verdict.name, "", "", "", "", str(one)) for one in found.gradients]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _worst(several: Sequence[Held]) -> str:
    if not several:
        return "-"
    verdict = worst(one.verdict for one in several)
    return str(next(one for one in several if one.verdict.verdict is verdict))
