r"""Names of one model's modules in JAX and in PyTorch; both directions come from one table.

A table is a mapping of patterns, a module in JAX to the same module in PyTorch:

========== ================================================================ ============
part       meaning                                                          allowed in
========== ================================================================ ============
``{n}``    a number, the same on both sides                                 both sides
``{p:q|k}`` one of these texts, the same on both sides (there: ``{p}``)     JAX
``{}``     the index of a stacked axis, which has no name in JAX            PyTorch
========== ================================================================ ============

Patterns name modules, as ``paths.module_of`` gives them, and hold no shapes: transposes,
convolutions and the heads of a DenseGeneral kernel (axes ``"ioo"``) follow from the axes in the
plan, and ``peft.tensors`` flattens them. A kernel that is several modules in PyTorch, as a
fused query-key-value is, has no row: one path has one name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping

from . import paths as paths_
from .errors import AdapterError, ConfigError, raise_all

Table = Mapping[str, str]
Names = Table | Callable[[str], str | None]

# What embeddings are called in transformers; only to tell them from kernels.
EMBEDDING = re.compile(r"emb[^.]*$|(^|\.)(wte|wpe|shared)$")

_FIELD = re.compile(r"\{(\w*)(?::([^{}]*))?\}")


def torch_name(table: Table, path: str) -> str | None:
    """Return the PyTorch module name of a parameter's path, or None where no row has it.

    Args:
        table: patterns, see this module; the first row that fits counts.
        path: of the parameter, such as ``"h_0.attn.q.kernel"``.

    Returns:
        The name, with a ``{}`` for the index of each stacked axis.

    Raises:
        ConfigError: lists every row whose sides do not fit each other.

    >>> table = {"h_{n}.attn.{p:q|k}": "model.layers.{n}.self_attn.{p}_proj"}
    >>> torch_name(table, "h_0.attn.q.kernel"), torch_name(table, "h_0.attn.v.kernel")
    ('model.layers.0.self_attn.q_proj', None)
    >>> torch_name({"layers.attn.q": "model.layers.{}.self_attn.q_proj"}, "layers.attn.q.kernel")
    'model.layers.{}.self_attn.q_proj'
    """
    return _first([row[0] for row in _rows(tuple(table.items()))], paths_.module_of(path))


def jax_name(table: Table, module: str) -> str | None:
    """Return the JAX module of a PyTorch module, or None where no row has it.

    Modules that are stacked in JAX have one name there, whatever their index.

    Args:
        table: patterns, as in ``torch_name``.
        module: the PyTorch module's name.

    Raises:
        ConfigError: as ``torch_name``.

    >>> table = {"h_{n}.attn.{p:q|k}": "model.layers.{n}.self_attn.{p}_proj"}
    >>> jax_name(table, "model.layers.11.self_attn.k_proj")
    'h_11.attn.k'
    >>> jax_name({"layers.attn.q": "model.layers.{}.self_attn.q_proj"},
    ...          "model.layers.7.self_attn.q_proj")
    'layers.attn.q'
    """
    return _first([row[1] for row in _rows(tuple(table.items()))], module)


def name_of(names: Names, path: str) -> str | None:
    """Return the PyTorch name of a path by a table or a function; None where it has none."""
    if isinstance(names, Mapping):
        return torch_name(names, path)
    try:
        return names(path)
    except LookupError:
        return None


def torch_names(names: Names, paths: Iterable[str]) -> dict[str, str]:
    """Return the PyTorch module name of every path.

    Args:
        names: a table, or a function from a path to a name, None or a ``LookupError``.
        paths: of parameters.

    Raises:
        AdapterError: lists every path without a name.

    >>> torch_names({"attn.q": "self_attn.q_proj"}, ["attn.q.kernel"])
    {'attn.q.kernel': 'self_attn.q_proj'}
    """
    found = {path: name_of(names, path) for path in paths}
    unmapped = sorted(path for path, name in found.items() if name is None)
    raise_all(
        AdapterError,
        "these parameters have no PyTorch name; give names=… a row for each of them",
        unmapped,
    )
    return {path: name for path, name in found.items() if name is not None}


def stacked(table: Table, field: str = "layer") -> dict[str, str]:
    """Return the table for the same model with its layers stacked, as ``lax.scan`` wants them.

    Args:
        table: one whose JAX side numbers the layers by ``.{layer}`` or ``_{layer}``.
        field: that field's name.

    >>> stacked({"model.layers.{layer}.mlp.up_proj": "model.layers.{layer}.mlp.up_proj"})
    {'model.layers.mlp.up_proj': 'model.layers.{}.mlp.up_proj'}
    """
    own = f"{{{field}}}"
    return {
        jax.replace(f".{own}", "").replace(f"_{own}", ""): torch.replace(own, "{}")
        for jax, torch in table.items()
    }


Rule = tuple[re.Pattern[str], str]


@functools.cache
def _rows(table: tuple[tuple[str, str], ...]) -> tuple[tuple[Rule, Rule], ...]:
    """Return both directions of every row: what it matches, and what it makes of that."""
    raise_all(ConfigError, "this table of names has rows that do not work", _problems(table))
    rows = []
    for jax, torch in table:
        choices = {name: choice for name, choice in _FIELD.findall(jax)}
        rows.append(
            (
                (_regex(jax, choices), torch),
                (_regex(torch, choices), _FIELD.sub(r"{\1}", jax)),
            )
        )
    return tuple(rows)


def _problems(table: tuple[tuple[str, str], ...]) -> list[str]:
    found, seen = [], {}
    for jax, torch in table:
        own, other = ({name for name, _ in _FIELD.findall(side)} for side in (jax, torch))
        if "" in own:
            found.append(f"{jax!r}: got '{{}}', which only the PyTorch side may have")
        if own - {""} != other - {""}:
            found.append(f"{jax!r}: got the fields {sorted(own)}, for PyTorch {sorted(other)}")
        meaning = _filled(torch, {name: field for field, name in _fields(jax)})
        if meaning in seen:
            found.append(f"{jax!r}: gives {torch!r}, as {seen[meaning]!r} does")
        seen[meaning] = jax
    return found


def _fields(pattern: str) -> list[tuple[str, str]]:
    """Return every field as it is written, and its name."""
    return [(field[0], field[1]) for field in _FIELD.finditer(pattern)]


def _regex(pattern: str, choices: Mapping[str, str]) -> re.Pattern[str]:
    seen: set[str] = set()
    literals = _FIELD.split(pattern)
    parts = [re.escape(literals[0])]
    for name, literal in zip(literals[1::3], literals[3::3], strict=True):
        own = "|".join(map(re.escape, choices.get(name, "").split("|")))
        own = own or r"\d+"
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{own})" if name else own)
        parts.append(re.escape(literal))
        seen |= {name} - {""}
    return re.compile("".join(parts))


def _first(rules: Iterable[Rule], name: str) -> str | None:
    for regex, template in rules:
        if found := regex.fullmatch(name):
            return _filled(template, found.groupdict())
    return None


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Put values in the places of fields; what has none is the index of a stack."""
    return _FIELD.sub(lambda field: values.get(field[1], "{}"), template)
