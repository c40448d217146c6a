"""Running a jaxpr with ``LoraWeight`` values in it.

Equations that no adapted weight reaches run as they are. For the others the registry has one
rule each. What the rules meet is recorded: where a weight is used, and where it cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend import core, source_info_util

from ..core import alora, lowrank, sharding
from ..core.adapter import Adapter
from ..core.errors import PlanError, raise_all
from ..core.initializers import fold_in_path
from ..core.xla.product_layout import Size
from . import meshes, shared_inputs
from .registry import RULES, Unsupported
from .replay import evaluate
from .sites import Place, Site, bias_problem, formed, work
from .trace import canonical
from .weight import LoraWeight, is_whole, use, window_axes

# Under `disable_jit` these are opened as well, so that execution really is op by op.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "scan")


@dataclass
class Record:
    """What one interpretation met, by the parameter's path and by the place of the equation.

    A loop body may be traced more than once, and one jaxpr may serve several calls: places count
    the first once and the second each time.

    Args:
        sites: where a parameter is used.
        rejected: where it is used in a way that has no rule, and why.
        together: the parameters that cannot both be adapted, and why.
        formed: the paths whose ``W + s·A·B`` was formed.
        met: the primitives that weights met while planning, by path.
        left_out: the weights that ``"all-linear"`` cannot adapt, and why; see ``left_out``.
        alone: tells of a variable whether it is made of parameters and constants alone.
        dropout_key: the random key of this interpretation, None for no dropout.
        active: where masked adapters act, see ``alora.silenced``; None while planning.
        times: how often the loops around it run it.
        place: the place of the call whose jaxpr this is.
        calls: the equations of the calls around it.
        product: what forms ``y + s·(x·A)·B`` at a product's site; initialisations that read the
            inputs put a probe there.
    """

    sites: dict[str, dict[Place, Site]] = field(default_factory=dict)
    rejected: dict[str, dict[Place, str]] = field(default_factory=dict)
    together: list[tuple[set[str], set[str], str]] = field(default_factory=list)
    formed: set[str] = field(default_factory=set)
    met: dict[str, set[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    alone: Callable[[Any], bool] = lambda atom: False
    dropout_key: Any = None
    active: Any = None
    times: int = 1
    place: Place = ()
    calls: tuple[core.JaxprEqn, ...] = ()
    product: Callable[..., Any] = lowrank.add_dot

    def sees_all(self, weight: LoraWeight) -> bool:
        """Tell whether a weight's low-rank path is the usual one, of all of the input."""
        masked = weight.masked and self.active is not None
        dropped = weight.dropout and self.dropout_key is not None
        usual = self.product is lowrank.add_dot and weight.gain is None
        return usual and not masked and not dropped

    def raise_rejected(self) -> None:
        """Raise one ``PlanError`` with every use that has no rule."""
        raise_all(
            PlanError,
            "these targets are used in a way that has no rule",
            (f"{path}: {why}" for path, found in self.rejected.items() for why in found.values()),
        )


@dataclass(frozen=True)
class Call:
    """One equation that an adapted weight reaches, as its rule sees it.

    ``index`` is its place in its jaxpr, which the random keys of dropout are made from, and
    ``hidden`` its ``x·A`` where that was formed together with others'.
    """

    record: Record
    inside: core.Jaxpr
    eqn: core.JaxprEqn
    index: int
    dense_gradient: bool = False
    hidden: Any = None

    @property
    def params(self) -> Mapping[str, Any]:
        """The primitive's parameters."""
        return self.eqn.params

    @property
    def place(self) -> Place:
        """Where the equation stands."""
        return (*self.record.place, self.index)

    @property
    def jaxpr(self) -> core.ClosedJaxpr:
        """The jaxpr inside a call-like equation."""
        inner = self.params.get("jaxpr", self.params.get("call_jaxpr"))
        return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())

    @property
    def out_shape(self) -> tuple[Size, ...]:
        """The shape of the primitive's one output."""
        return self.eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]

    def site(
        self,
        weight: LoraWeight,
        contracted: Sequence[int],
        batch: Sequence[int] = (),
        window: Sequence[int] = (),
        groups: int = 1,
        stacks: bool = False,
    ) -> None:
        """Record that this equation is a site of the weight, or raise ``Unsupported``.

        The arguments are those of ``use``, and a convolution's number of groups.
        """
        found, name = use(weight, contracted, batch, window, stacks), self.eqn.primitive.name
        whole = is_whole(weight, contracted, found)
        if weight.bias is not None:
            swapped = [leaf.path for leaf in weight.leaves if found[leaf.path] != leaf.letters]
            if problem := bias_problem(name, bool(swapped), whole):
                raise Unsupported(problem)
        ends = {*contracted, *batch}
        kept = math.prod(n for axis, n in enumerate(weight.base.shape) if axis not in ends)
        rows = self.record.times * math.prod(self.out_shape) // max(kept, 1)
        for n, leaf in enumerate(weight.leaves):
            slides = window_axes(weight, window, n)
            letters = found[leaf.path] if leaf.letters is None else leaf.letters
            needed = work(weight, letters, contracted, batch, n)
            site = Site(
                name, found[leaf.path], self.dense_gradient, slides, rows, groups, whole, needed
            )
            self.record.sites.setdefault(leaf.path, {})[self.place] = site

    def reject_together(self, one: LoraWeight, other: LoraWeight, why: Unsupported) -> None:
        """Record that not both weights can be adapted."""
        said = f"{self.eqn.primitive.name}: {why} ({_source(self)})"
        self.record.together.append((set(one.paths), set(other.paths), said))

    def dropped(self, x: Any, weight: LoraWeight, adapter: Adapter) -> tuple[Any, Adapter]:
        """Return what this site feeds the low-rank path: x after dropout, and its adapter."""
        key, path = self.record.dropout_key, weight.paths[0]
        if key is None or not adapter.dropout:
            return x, adapter
        own = jax.random.fold_in(fold_in_path(meshes.here(key), path), self.index)
        return lowrank.drop(x, adapter, own)

    def activated(self, x: Any, weight: LoraWeight, used: Sequence[int]) -> Any:
        """Return x without what a masked adapter does not act on.

        Args:
            x: what this site feeds the low-rank path.
            weight: what it meets.
            used: the axes of x that are not in the output by themselves.

        Raises:
            Unsupported: the mask does not fit x.
        """
        if not weight.masked or self.record.active is None:
            return x
        kept = [axis for axis in range(x.ndim) if axis not in used]
        try:
            return alora.silenced(x, self.record.active, kept)
        except ValueError as problem:
            raise Unsupported(str(problem)) from problem

    def refuse_masked(self, weight: LoraWeight) -> None:
        """Raise ``Unsupported`` for an aLoRA at a site of another kind than a plain product."""
        if weight.masked:
            raise Unsupported("aLoRA has a rule for plain products alone")

    def refuse_dropout(self, weight: LoraWeight) -> None:
        """Raise ``Unsupported`` where dropout is asked for at a site of DoRA's without a rule."""
        if self.record.dropout_key is not None and weight.dropout:
            raise Unsupported("DoRA with lora_dropout has no rule here")

    def interpret(
        self,
        closed: core.ClosedJaxpr,
        *operands: Any,
        dense_gradient: bool = False,
        dropout_key: Any = None,
        part: int = 0,
    ) -> list[Any]:
        """Run an inner jaxpr with the same record and a key of its own, or that of a loop's step.

        JAX shares one inner jaxpr between the calls of a function; their keys must differ. Of
        several inner jaxprs, ``part`` tells which one it is.
        """
        key = self.record.dropout_key if dropout_key is None else dropout_key
        key = None if key is None else jax.random.fold_in(key, self.index)
        dense_gradient |= self.dense_gradient
        turns = self.params["length"] if self.eqn.primitive.name == "scan" else 1
        record = replace(
            self.record,
            dropout_key=key,
            times=turns * self.record.times,
            place=(*self.place, part),
            calls=(*self.record.calls, self.eqn),
        )
        return interpret(record, closed, operands, dense_gradient=dense_gradient)

    def plain(self, *operands: Any) -> Any:
        """Run the equation as its author wrote it, on arrays."""
        outs = evaluate(self.inside, [self.eqn], self.eqn.invars, self.eqn.outvars, operands)
        return outs if self.eqn.primitive.multiple_results else outs[0]


def interpret(
    record: Record,
    closed: core.ClosedJaxpr,
    operands: Sequence[Any],
    *,
    dense_gradient: bool = False,
) -> list[Any]:
    """Return the jaxpr's outputs for operands of which some are ``LoraWeight``."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(canonical, closed.consts), strict=True))
    env |= dict(zip(jaxpr.invars, operands, strict=True))
    weights = {var for var, value in env.items() if isinstance(value, LoraWeight)}
    steps = shared_inputs.in_order(jaxpr, weights)
    last_use = _last_use(jaxpr, steps)
    hidden: dict[int, Any] = {}
    pending: list[core.JaxprEqn] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    def run_pending(upto: int) -> None:
        if not pending:
            return
        defined = {var: None for eqn in pending for var in eqn.outvars}
        used = {v: None for eqn in pending for v in eqn.invars if not isinstance(v, core.Literal)}
        inputs = [var for var in used if var not in defined]
        outputs = [var for var in defined if last_use.get(var, -1) >= upto]
        outs = evaluate(jaxpr, pending, inputs, outputs, map(read, inputs))
        env.update(zip(outputs, outs, strict=True))
        pending.clear()

    opened = _CALLS if jax.config.jax_disable_jit else ()  # pyright: ignore[reportAttributeAccessIssue]
    for at, (index, eqn) in enumerate((step.index, step.eqn) for step in steps):
        reached = any(not isinstance(v, core.Literal) and v in weights for v in eqn.invars)
        if not reached and eqn.primitive.name not in opened:
            pending.append(eqn)
            continue
        run_pending(at)
        if steps[at].siblings:
            found = {n: jaxpr.eqns[n] for n in steps[at].siblings}
            products = {n: (one, *map(read, one.invars)) for n, one in found.items()}
            hidden |= shared_inputs.share(products, record.sees_all)
        call = Call(record, jaxpr, eqn, index, dense_gradient, hidden.pop(index, None))
        outs = _apply(call, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
        weights |= {v for v, out in zip(eqn.outvars, outs, strict=True) if _is_weight(out)}
    run_pending(len(steps))
    return [read(atom) for atom in jaxpr.outvars]


def base_of(value: Any) -> Any:
    """Return the frozen array of a ``LoraWeight``, anything else as it is."""
    return value.base if isinstance(value, LoraWeight) else value


def _apply(call: Call, operands: list[Any]) -> list[Any]:
    name = call.eqn.primitive.name
    for weight in filter(_is_weight, operands):
        if weight.planning:
            for path in weight.paths:
                call.record.met.setdefault(path, set()).add(name)
    try:
        if name not in RULES:
            raise Unsupported("there is no rule for it")
        with meshes.around(call.eqn):
            outs = RULES[name](call, *operands)
    except Exception as problem:
        why = _reason(problem, operands)
        whole = [formed(call.record, value, call.place) for value in operands]
        if any(map(_is_weight, whole)) and any(map(_differ, whole, operands)):
            return _apply(call, whole)
        for weight in filter(_is_weight, whole):
            _reject(call, weight, why)
        outs = call.plain(*map(base_of, whole))
    outs = list(outs) if call.eqn.primitive.multiple_results else [outs]
    return [_typed(call, n, out) for n, out in enumerate(outs)]


def _reason(problem: Exception, operands: Sequence[Any]) -> Unsupported:
    """Return why a rule cannot follow its weights; what is no rule's word is raised.

    While planning every matrix is followed, and one that is not a target must break no plan.
    """
    if isinstance(problem, Unsupported):
        return problem
    if not any(_is_weight(value) and value.planning for value in operands):
        raise problem
    first = next(iter(str(problem).splitlines()), "")
    return Unsupported(f"{type(problem).__name__}: {first}")


def _typed(call: Call, n: int, out: Any) -> Any:
    """Return an output sharded as the author's is, where types say how."""
    wanted: Any = call.eqn.outvars[n].aval
    if not sharding.is_explicit(getattr(wanted, "sharding", None)):
        return out
    with meshes.around(call.eqn):
        if not _is_weight(out):
            return meshes.as_typed(out, wanted)
        return replace(out, base=meshes.as_typed(out.base, wanted))


def _differ(one: Any, two: Any) -> bool:
    return one is not two


def _reject(call: Call, weight: LoraWeight, why: Unsupported) -> None:
    shape = tuple(weight.base.shape)
    said = f"{call.eqn.primitive.name} of shape {shape}: {why} ({_source(call)})"
    for path in weight.paths:
        call.record.rejected.setdefault(path, {})[call.place] = said


def _source(call: Call) -> str:
    """Return file and line of the author's code; inside JAX's own functions, of their call."""
    innermost_first = (call.eqn, *reversed(call.record.calls))
    known = (source_info_util.summarize(eqn.source_info) for eqn in innermost_first)
    return next(filter(None, known), "of unknown source")


def _last_use(jaxpr: core.Jaxpr, steps: Sequence[shared_inputs.Step]) -> dict[Any, int]:
    last: dict[Any, int] = {}
    for at, step in enumerate(steps):
        last |= {v: at for v in step.eqn.invars if not isinstance(v, core.Literal)}
    end = len(steps)
    return last | {v: end for v in jaxpr.outvars if not isinstance(v, core.Literal)}


def _is_weight(value: Any) -> bool:
    return isinstance(value, LoraWeight)
