r"""``target_parameters`` in PEFT's file: several experts in one tensor; pure functions.

PEFT keeps all E experts of a parameter ``(E, first, last)`` in two matrices. In A the expert is
the slowest index of an axis, in B the fastest:

========== ============== ============================= ==================================
tensor     shape          entry                         holds
========== ============== ============================= ==================================
``lora_A`` (E·r, last)    ``A[e·r + k, n]``             expert e, rank k, index n of last
``lora_B`` (first, r·E)   ``B[n, k·E + e]``             expert e, rank k, index n of first
========== ============== ============================= ==================================

The places of the axes decide, not their use: where a model multiplies ``x @ W[e]``, ``lora_A``
is of the out axis. ``LoraConfig.transposed_parameters`` exchanges first and last, as PEFT does for
modules that say ``is_transposed``. A parameter of two axes is the same with one expert.

A module is wrapped once for each of its parameters, in the order in which it registers them, and
the last wrapper is the outermost: ``experts.lora_A`` belongs to the last parameter,
``experts.base_layer.lora_A`` to the one before, and so on. Whatever else lies in such a module has
``base_layer`` in its name, too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core import paths
from ...core.adapter import IN, OUT, STACKED
from ...core.config import lora_config
from ...core.config.lora_config import LoraConfig
from ...core.errors import AdapterError, raise_all
from ...rewrite import LeafPlan
from ..names.naming import Names, name_of

SLOW, FAST = "expert slowest", "expert fastest"
WRAPPED = ".base_layer"

# The order in which the modules of transformers register their experts. A file does not say.
REGISTERED = (("gate_up_proj", "down_proj"), ("w1", "v1", "w2"))


def packed(factors: np.ndarray, packing: str) -> np.ndarray:
    """Return PEFT's matrix of these factors, ``(E, r, n)``: one low-rank factor for each expert.

    Args:
        factors: ``(E, r, n)``.
        packing: ``SLOW`` gives ``lora_A``, ``(E·r, n)``; ``FAST`` gives ``lora_B``, ``(n, r·E)``.

    >>> factors = np.array([[["e0 k0"], ["e0 k1"]], [["e1 k0"], ["e1 k1"]]])
    >>> packed(factors, SLOW)[:, 0].tolist()
    ['e0 k0', 'e0 k1', 'e1 k0', 'e1 k1']
    >>> packed(factors, FAST)[0].tolist()
    ['e0 k0', 'e1 k0', 'e0 k1', 'e1 k1']
    """
    experts, r, size = factors.shape
    if packing == SLOW:
        return factors.reshape(experts * r, size)
    return factors.transpose(2, 1, 0).reshape(size, r * experts)


def unpacked(matrix: np.ndarray, packing: str, experts: int) -> np.ndarray:
    """Return ``(E, r, n)`` from PEFT's matrix: ``packed``, undone.

    >>> matrix = np.arange(12).reshape(2, 6)
    >>> bool((packed(unpacked(matrix, FAST, 3), FAST) == matrix).all())
    True
    """
    if packing == SLOW:
        return matrix.reshape(experts, -1, matrix.shape[1])
    return matrix.reshape(matrix.shape[0], -1, experts).transpose(2, 1, 0)


def halves(config: LoraConfig, leaf: LeafPlan) -> dict[str, str]:
    """Return which part of the adapter, ``"a"`` or ``"b"``, each packing holds."""
    letters = leaf.axes.replace(STACKED, "")
    slow = letters[0] if lora_config.is_transposed(config, leaf.path) else letters[-1]
    return {SLOW: "a", FAST: "b"} if slow == IN else {SLOW: "b", FAST: "a"}


def to_matrix(whole: np.ndarray, part: str, packing: str) -> np.ndarray:
    """Return PEFT's matrix of A ``(*E, in, r)`` or B ``(*E, r, out)``, where ``*E`` may be none."""
    if part == "a":
        return packed(whole.reshape(-1, *whole.shape[-2:]).transpose(0, 2, 1), packing)
    return packed(whole.reshape(-1, *whole.shape[-2:]), packing)


def from_matrix(matrix: np.ndarray, r: int, part: str, packing: str) -> np.ndarray:
    """Return A ``(E, in, r)`` or B ``(E, r, out)``: ``to_matrix``, undone."""
    experts = matrix.shape[0 if packing == SLOW else 1] // r
    factors = unpacked(matrix, packing, experts)
    return factors.transpose(0, 2, 1) if part == "a" else factors


def shape_problem(leaf: LeafPlan, name: str) -> str | None:
    """Return why a parameter with this name has no place in the file; None if it has one."""
    stacked = leaf.axes.count(STACKED) - name.count("{}")
    if len(leaf.axes) - name.count("{}") not in (2, 3):
        return f"got {leaf.shape} and the name {name!r}, wanted two axes, or three with the experts"
    if leaf.axes.replace(STACKED, "") not in (IN + OUT, OUT + IN) or stacked not in (0, 1):
        return (
            f"got axes {leaf.axes!r}, wanted one in, one out and one stacked for the experts: PEFT "
            "has an adapter for each index of the first of three axes"
        )
    return None


def in_torch(path: str, name: str) -> str:
    """Return the PyTorch parameter of a path whose ``names`` give this.

    Names are those of modules, and a leaf without one of the usual weight names is its own. So
    is a Flax ``kernel``: only ``weight`` and ``w`` are parameters in PyTorch, too.

    >>> in_torch("0.experts.up", "0.experts.up"), in_torch("up.kernel", "0.experts.up")
    ('0.experts.up', '0.experts.up')
    >>> in_torch("q.weight", "q"), in_torch("q.w", "q"), in_torch("q.w", "0.experts.up")
    ('q.weight', 'q.w', '0.experts.up')
    """
    leaf = paths.leaf_name(path)
    torchs = leaf == "weight" or (leaf == "w" and name == paths.module_of(path))
    ending = f"{paths.SEPARATOR}{leaf}"
    return name + ending if torchs and not name.endswith(ending) else name


@dataclass(frozen=True)
class Wrappers:
    """The modules that PEFT wraps for their parameters.

    Args:
        modules: by a module's name its parameters, in the order in which it registers them.
    """

    modules: Mapping[str, tuple[str, ...]]

    def inside(self, name: str) -> str:
        """Return the name that something gets in these modules once they are wrapped.

        >>> Wrappers({"0.experts": ("up", "down")}).inside("0.experts.router")
        '0.experts.base_layer.base_layer.router'
        """
        found, parts = "", name.split(paths.SEPARATOR)
        for n, part in enumerate(parts):
            owner = paths.SEPARATOR.join(parts[: n + 1])
            found += paths.SEPARATOR * (n > 0) + part + WRAPPED * len(self.modules.get(owner, ()))
        return found

    def around(self, parameter: str) -> str:
        """Return the name of a parameter's own wrapper, which holds its A and B.

        >>> Wrappers({"0.experts": ("up", "down")}).around("0.experts.up")
        '0.experts.base_layer'
        """
        owner, _, name = parameter.rpartition(paths.SEPARATOR)
        own = self.modules[owner]
        outside = Wrappers({one: held for one, held in self.modules.items() if one != owner})
        return outside.inside(owner) + WRAPPED * (len(own) - 1 - own.index(name))


def wrappers(config: LoraConfig, held: Mapping[str, str]) -> Wrappers:
    """Return PEFT's wrappers for these parameters, by path their names in PyTorch.

    The order in which a module registers them is known for those of ``REGISTERED``; elsewhere
    it is the order in ``target_parameters``.

    Raises:
        AdapterError: lists the parameters without a module, which PEFT refuses.
    """
    modules: dict[str, list[str]] = {}
    for path in in_given_order(config, held):
        owner, _, name = held[path].rpartition(paths.SEPARATOR)
        modules.setdefault(owner, []).append(name)
    top = [f"{name}: at the top of the model" for name in modules.get("", ())]
    raise_all(AdapterError, "PEFT adapts parameters only of modules below the model", top)
    return Wrappers({owner: tuple(registered(names)) for owner, names in modules.items()})


def in_given_order(config: LoraConfig, among: Iterable[str]) -> list[str]:
    """Return the bare parameters among these paths, in the order of ``target_parameters``."""
    given = config.target_parameters or ()
    found = {path: lora_config.parameter_name(config, path) for path in among}
    places = {path: given.index(name) for path, name in found.items() if name is not None}
    return sorted(places, key=lambda path: (places[path], path))


def registered(names: Sequence[str]) -> Sequence[str]:
    """Return a module's parameters in the order in which it registers them, where that is known.

    >>> registered(["down_proj", "gate_up_proj"]), registered(["b", "a"])
    (['gate_up_proj', 'down_proj'], ['b', 'a'])
    """
    known = next((order for order in REGISTERED if set(names) <= set(order)), ())
    return sorted(names, key=known.index) if known else names


def ordered(parameters: Iterable[str]) -> list[str]:
    """Return parameters of many modules in one order, which is that of ``registered`` in each.

    >>> ordered(["0.down_proj", "1.down_proj", "0.gate_up_proj", "1.gate_up_proj"])
    ['0.gate_up_proj', '1.gate_up_proj', '0.down_proj', '1.down_proj']
    """
    by_name: dict[str, list[str]] = {}
    for one in parameters:
        by_name.setdefault(paths.leaf_name(one), []).append(one)
    return [one for name in registered(list(by_name)) for one in sorted(by_name[name])]


def names_in_torch(leaf: LeafPlan, name: str) -> list[str]:
    """Return the PyTorch parameters that a leaf is: one, or one for each index that it stacks."""
    name = in_torch(leaf.path, name)
    stacked = [n for n, s in zip(leaf.shape, leaf.axes, strict=True) if s == STACKED]
    indices = itertools.product(*map(range, stacked[: name.count("{}")]))
    return [name.format(*index) for index in indices]


def told_apart(config: LoraConfig, adapted: Iterable[str]) -> tuple[set[str], list[str], list[str]]:
    """Return the modules among the owners of a file's tensors, the parameters, and problems.

    Args:
        config: the file's, whose ``target_parameters`` say what a wrapper may hold.
        adapted: the owners by their names in the file, ``base_layer`` included.

    >>> config = LoraConfig(target_parameters=["gate_up_proj", "experts.down_proj"])
    >>> told_apart(config, ["0.experts", "0.experts.base_layer"])
    (set(), ['0.experts.gate_up_proj', '0.experts.down_proj'], [])
    """
    modules: set[str] = set()
    wrapped: dict[str, int] = {}
    for name in sorted(adapted):
        module = name.replace(WRAPPED, "")
        if _held(config, module) and not lora_config.matches(config.target_modules, module):
            wrapped[module] = wrapped.get(module, 0) + 1
        else:
            modules.add(module)
    parameters, problems = [], []
    for module, count in wrapped.items():
        own = _held(config, module)
        if len(own) != count:
            problems.append(
                f"{module}: has tensors of {count} parameters, but target_parameters names "
                f"{', '.join(own)}"
            )
        parameters += [f"{module}.{name}" for name in own]
    return modules, ordered(parameters), problems


def _held(config: LoraConfig, module: str) -> list[str]:
    """Return the parameters that ``target_parameters`` may mean in a module."""
    split = (name.rpartition(paths.SEPARATOR) for name in config.target_parameters or ())
    return [name for owner, _, name in split if not owner or lora_config.matches((owner,), module)]


def in_jax(parameters: Iterable[str], names: Names, params: Any) -> dict[str, str | None]:
    """Return the JAX path of each PyTorch parameter; None where it has none."""
    known = {}
    for path in paths.flatten(params):
        if name := name_of(names, path):
            regex = r"\d+".join(map(re.escape, in_torch(path, name).split("{}")))
            known[path.replace("/", paths.SEPARATOR)] = re.compile(regex)
    return {
        one: next((path for path, regex in known.items() if regex.fullmatch(one)), None)
        for one in parameters
    }
