"""Which of a function's outputs are its inputs, unchanged.

Flax's ``nnx`` hands every variable out of the functions that it transforms, and a body that is
itself jitted or rematerialised hides that what comes out went in. Such a weight is not computed:
the caller may go on with the one it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

Places = list[int | None]
"""For each output the number of the input that it is, None where it is none."""


def passed(jaxpr: core.Jaxpr) -> Places:
    """Return which input each output of a jaxpr is.

    >>> import jax
    >>> inner = jax.jit(lambda x, y: (y, 2 * x))
    >>> passed(jax.make_jaxpr(lambda x, y: (x, *inner(x, y)))(1.0, 2.0).jaxpr)
    [0, 1, None]
    """
    known = {var: n for n, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        of_equation = _PASSED.get(eqn.primitive.name)
        if of_equation is None or not any(_place(known, atom) is not None for atom in eqn.invars):
            continue
        for out, source in zip(eqn.outvars, of_equation(eqn), strict=True):
            if source is not None and (place := _place(known, eqn.invars[source])) is not None:
                known[out] = place
    return [_place(known, atom) for atom in jaxpr.outvars]


def carried(body: core.Jaxpr, consts: int, carry: int) -> list[bool]:
    """Tell of each value that a loop carries whether every turn hands it on unchanged."""
    sources = passed(body)
    return [sources[n] == consts + n for n in range(carry)]


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Return how many operands of a scan are constants and how many are carried."""
    if "ft_in" in eqn.params:  # since jax 0.12
        consts, carry, _ = map(len, eqn.params["ft_in"].unpack())
        return consts, carry
    return eqn.params["num_consts"], eqn.params["num_carry"]


def of_scan(eqn: core.JaxprEqn) -> Places:
    """Return which operand each output of a scan is: what it carries, or scans over, unchanged."""
    consts, carry = scan_counts(eqn)
    sources = passed(_jaxpr(eqn.params["jaxpr"]))
    kept = [consts + n if sources[n] == consts + n else None for n in range(carry)]
    scanned = [n if n is not None and n >= consts + carry else None for n in sources[carry:]]
    return kept + scanned


def of_cond(eqn: core.JaxprEqn) -> Places:
    """Return which operand each output of a ``cond`` is, whatever branch is taken."""
    branches = [passed(_jaxpr(branch)) for branch in eqn.params["branches"]]
    return [_shifted(set(sources), 1) for sources in zip(*branches, strict=True)]


def of_shard_map(eqn: core.JaxprEqn) -> Places:
    """Return which operand each output is that leaves sharded as it came in."""
    sources, params = passed(_jaxpr(eqn.params["jaxpr"])), eqn.params
    return [
        n if n is not None and params["in_specs"][n] == params["out_specs"][place] else None
        for place, n in enumerate(sources)
    ]


def _of_while(eqn: core.JaxprEqn) -> Places:
    consts = eqn.params["body_nconsts"]
    before = eqn.params["cond_nconsts"] + consts
    kept = carried(_jaxpr(eqn.params["body_jaxpr"]), consts, len(eqn.outvars))
    return [before + n if same else None for n, same in enumerate(kept)]


def _of_call(eqn: core.JaxprEqn) -> Places:
    return passed(_jaxpr(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))))


def _all(eqn: core.JaxprEqn) -> Places:
    return list(range(len(eqn.outvars)))


_PASSED: dict[str, Callable[[core.JaxprEqn], Places]] = {
    **dict.fromkeys(
        ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"), _of_call
    ),
    **dict.fromkeys(("name", "copy", "copy_p", "optimization_barrier"), _all),
    "scan": of_scan,
    "while": _of_while,
    "cond": of_cond,
    "shard_map": of_shard_map,
}


def _place(known: dict[Any, int], atom: Any) -> int | None:
    return None if isinstance(atom, core.Literal) else known.get(atom)


def _jaxpr(inner: Any) -> core.Jaxpr:
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


def _shifted(sources: Sequence[int | None] | set[int | None], by: int) -> int | None:
    """Return the one source that there is, so much further on."""
    (source,) = sources if len(sources) == 1 else (None,)
    return None if source is None else source + by
