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
plan, and ``peft.slots`` flattens them.

A row to a ``Fused`` has a field of choices on one side only. On the JAX side, these kernels are
side by side in one PyTorch weight; on the PyTorch side, one JAX kernel is these weights side by
side. A module named ``….in_proj_weight`` is PyTorch's ``nn.MultiheadAttention``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ...core import paths as paths_
from ...core.errors import AdapterError, ConfigError, raise_all


@dataclass(frozen=True)
class Fused:
    """The PyTorch side of a row whose kernels are one weight on one side, several on the other.

    ``W[o] = parts[order(o)]`` over the output axis o, one part after the other (``"blocks"``) or
    for each head in turn its rows of every part (``"heads"``), as GPT-NeoX and BLOOM have them.

    Args:
        torch: the pattern. The parts are the choices, in their order, of the field that only
            one side has.
        order: ``"blocks"`` or ``"heads"``.
        heads: how many heads, or groups of heads, follow each other; None reads it from kernels
            that keep their heads apart.
        widths: how wide the parts are relative to each other, where JAX has them fused; None for
            equal ones. With 12 heads and 2 of key and value it is ``(6, 1, 1)``.

    >>> torch_name({"h_{n}.{p:query|key|value}": Fused("h.{n}.c_attn")}, "h_0.key.kernel")
    'h.0.c_attn'
    """

    torch: str
    order: str = "blocks"
    heads: int | None = None
    widths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Place:
    """Where a module is on the other side.

    Args:
        name: the module there.
        part: which part of the fused weight this pair of modules shares.
        parts: how many there are; one without ``fused``.
        fused: the row's right side, where it is a ``Fused``.
        jax_is_fused: whether the one weight of several parts is JAX's.
    """

    name: str
    part: int = 0
    parts: int = 1
    fused: Fused | None = None
    jax_is_fused: bool = False


Table = Mapping[str, str | Fused]
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
        The name, with a ``{}`` for the index of each stacked axis; the first, where the kernel
        is several modules (``places`` has all of them).

    Raises:
        ConfigError: lists every row whose sides do not fit each other.

    >>> table = {"h_{n}.attn.{p:q|k}": "model.layers.{n}.self_attn.{p}_proj"}
    >>> torch_name(table, "h_0.attn.q.kernel"), torch_name(table, "h_0.attn.v.kernel")
    ('model.layers.0.self_attn.q_proj', None)
    >>> torch_name({"layers.attn.q": "model.layers.{}.self_attn.q_proj"}, "layers.attn.q.kernel")
    'model.layers.{}.self_attn.q_proj'
    """
    found = places(table, path)
    return found[0].name if found else None


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
    found = origins(table, module)
    return found[0].name if found else None


def places(names: Names, path: str) -> tuple[Place, ...]:
    """Return every PyTorch module that a parameter's path is, or is a part of; empty for none.

    >>> table = {"attn.qkv": Fused("attn.{p:q|k|v}_proj")}
    >>> [place.name for place in places(table, "attn.qkv.kernel")]
    ['attn.q_proj', 'attn.k_proj', 'attn.v_proj']
    """
    if isinstance(names, Mapping):
        return _all(_rows(tuple(names.items())), paths_.module_of(path), 0)
    name = name_of(names, path)
    return () if name is None else (Place(name),)


def origins(table: Table, module: str) -> tuple[Place, ...]:
    """Return every JAX module that a PyTorch module is, or is a part of; empty for none.

    >>> table = {"attn.{p:query|key|value}": Fused("attn.in_proj_weight")}
    >>> [(place.name, place.part) for place in origins(table, "attn.in_proj_weight")]
    [('attn.query', 0), ('attn.key', 1), ('attn.value', 2)]
    """
    return _all(_rows(tuple(table.items())), module, 1)


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


def stacked(table: Table, field: str = "layer") -> dict[str, str | Fused]:
    """Return the table for the same model with its layers stacked, as ``lax.scan`` wants them.

    Args:
        table: one whose JAX side numbers the layers by ``.{layer}`` or ``_{layer}``.
        field: that field's name.

    >>> stacked({"model.layers.{layer}.mlp.up_proj": "model.layers.{layer}.mlp.up_proj"})
    {'model.layers.mlp.up_proj': 'model.layers.{}.mlp.up_proj'}
    """
    own = f"{{{field}}}"

    def unnumbered(torch: str | Fused) -> str | Fused:
        if isinstance(torch, Fused):
            return replace(torch, torch=torch.torch.replace(own, "{}"))
        return torch.replace(own, "{}")

    return {
        jax.replace(f".{own}", "").replace(f"_{own}", ""): unnumbered(torch)
        for jax, torch in table.items()
    }


Rule = tuple[re.Pattern[str], str]
Items = tuple[tuple[str, str | Fused], ...]


@dataclass(frozen=True)
class _Row:
    """One pair of modules: what both directions match and make of it, and which part it is."""

    rules: tuple[Rule, Rule]
    place: Place
    source: str


@functools.cache
def _rows(table: Items) -> tuple[_Row, ...]:
    """Return every row, those of a ``Fused`` one for each part."""
    raise_all(ConfigError, "this table of names has rows that do not work", _problems(table))
    return tuple(row for jax, torch in table for row in _parts(jax, torch))


def _parts(jax: str, torch: str | Fused) -> Iterable[_Row]:
    if isinstance(torch, str):
        yield _row(jax, torch, Place(""), jax)
        return
    [(name, choices)] = _lone(jax, torch.torch)
    fused_in_jax = name not in _choices(jax)
    for part, own in enumerate(choices):
        chosen = functools.partial(_chosen, name, own)
        here, there = _FIELD.sub(chosen, jax), _FIELD.sub(chosen, torch.torch)
        yield _row(here, there, Place("", part, len(choices), torch, fused_in_jax), jax)


def _chosen(name: str, choice: str, field: re.Match[str]) -> str:
    return choice if field[1] == name else field[0]


def _row(jax: str, torch: str, place: Place, source: str) -> _Row:
    choices = _choices(jax)
    there = (_regex(jax, choices), torch)
    return _Row((there, (_regex(torch, choices), _FIELD.sub(r"{\1}", jax))), place, source)


def _choices(pattern: str) -> dict[str, str]:
    """Return what the fields of a pattern may be; nothing stands for a number."""
    return {name: choice for name, choice in _FIELD.findall(pattern)}


def _lone(jax: str, torch: str) -> list[tuple[str, list[str]]]:
    """Return the fields that one side alone has, and their choices."""
    own, other = _choices(jax), _choices(torch)
    return [
        (name, (own | other)[name].split("|"))
        for name in sorted((own.keys() ^ other.keys()) - {""})
    ]


def _problems(table: Items) -> list[str]:
    found, seen = [], {}
    for jax, row in table:
        torch = row.torch if isinstance(row, Fused) else row
        if "" in _choices(jax):
            found.append(f"{jax!r}: got '{{}}', which only the PyTorch side may have")
        lone = _lone(jax, torch)
        if isinstance(row, Fused):
            found += [f"{jax!r}: {problem}" for problem in _unfit(row, lone)]
        elif lone:
            own, other = (sorted(_choices(side).keys() - {""}) for side in (jax, torch))
            found.append(f"{jax!r}: got the fields {own}, for PyTorch {other}")
        own = {name: field for field, name in _fields(jax)}
        split = [{name: one} for name, many in lone if name in _choices(torch) for one in many]
        parts = [_filled(torch, own | chosen) for chosen in split or [{}]]
        for part in parts:
            if part in seen:
                found.append(f"{jax!r}: gives {part!r}, as {seen[part]!r} does")
            seen[part] = jax
    return found


def _unfit(row: Fused, lone: list[tuple[str, list[str]]]) -> Iterable[str]:
    if len(lone) != 1 or len(lone[0][1]) < 2:
        yield f"got {row.torch!r}, wanted one field of choices that only one side has"
    elif row.widths and (len(row.widths) != len(lone[0][1]) or min(row.widths) < 1):
        yield f"got widths {row.widths}, wanted {len(lone[0][1])} of at least 1"
    if row.order not in ("blocks", "heads"):
        yield f"got order {row.order!r}, wanted 'blocks' or 'heads'"
    elif row.heads is not None and (row.order == "blocks" or row.heads < 1):
        yield f"got heads={row.heads} with order {row.order!r}"


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


def _all(rows: Iterable[_Row], name: str, way: int) -> tuple[Place, ...]:
    """Return what the first row that fits makes of a name, with every part of it."""
    found: list[Place] = []
    source = None
    for row in rows:
        regex, template = row.rules[way]
        if source in (None, row.source) and (match := regex.fullmatch(name)):
            source = row.source
            found.append(replace(row.place, name=_filled(template, match.groupdict())))
    return tuple(found)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Put values in the places of fields; what has none is the index of a stack."""
    return _FIELD.sub(lambda field: values.get(field[1], "{}"), template)
