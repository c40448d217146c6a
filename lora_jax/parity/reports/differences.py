"""Two reports beside each other: what is new, gone, worse, or further from the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..verdicts import TensorVerdict, Verdict, worst
from .checks import CheckResult
from .report import Report
from .summary import ratio_text

# Between two seeds error ratios of small tensors move by a quarter.
GROWTH = 1.5


class Kind(StrEnum):
    """In what way a check or a tensor differs from the earlier report."""

    WORSE = "worse"
    GREW = "grew"
    GONE = "gone"
    NEW = "new"


@dataclass(frozen=True)
class Difference:
    """One difference between two reports.

    Args:
        kind: in what way.
        check: the check's name.
        tensor: the tensor's; empty where the whole check is meant.
        earlier: what the earlier report said; empty for what is new.
        now: what this one says; empty for what is gone.
    """

    kind: Kind
    check: str
    tensor: str = ""
    earlier: str = ""
    now: str = ""

    def __str__(self) -> str:
        name = f"{self.check}, {self.tensor}" if self.tensor else self.check
        return f"{self.kind}: {name}: {self.earlier or 'not there'} -> {self.now or 'not there'}"


def differences(report: Report, earlier: Report) -> list[Difference]:
    """Return what changed for the worse since an earlier report, and what came and went.

    A verdict that got worse comes first, then error ratios that grew by more than 1.5 times,
    then checks and tensors that are gone, then those that are new. A tensor that is no longer
    compared is a difference, since it would otherwise fail unseen.

    >>> def one(verdict, jax):
    ...     tensor = TensorVerdict("y", verdict, jax, 1e-8)
    ...     return Report({}, [CheckResult("demo", 1, (tensor,))])
    >>> before = one(Verdict.ORDER_ONLY, 1e-8)
    >>> for found in differences(one(Verdict.BIASED, 2e-8), before):
    ...     print(found)
    worse: demo, y: ORDER-ONLY -> BIASED
    grew: demo, y: 1.00 -> 2.00
    >>> differences(before, before)
    []
    """
    old = {check.name: check for check in earlier.checks}
    new = {check.name: check for check in report.checks}
    found = [one for name in new if name in old for one in _of_check(new[name], old[name])]
    found += [Difference(Kind.GONE, n, earlier=_said(old[n])) for n in old if n not in new]
    found += [Difference(Kind.NEW, n, now=_said(new[n])) for n in new if n not in old]
    order = list(Kind)
    return sorted(found, key=lambda one: order.index(one.kind))


def _of_check(now: CheckResult, before: CheckResult) -> Iterator[Difference]:
    if now.skipped or now.error or before.skipped or before.error:
        if _worse(now.verdict, before.verdict) or (now.error and not before.error):
            yield Difference(Kind.WORSE, now.name, "", _said(before), _said(now))
        elif now.skipped and not before.skipped:
            yield Difference(Kind.GONE, now.name, "", _said(before), _said(now))
        elif before.skipped and not now.skipped:
            yield Difference(Kind.NEW, now.name, "", _said(before), _said(now))
        return
    old, new = _tensors(before.tensors), _tensors(now.tensors)
    for name in new:
        if name not in old:
            yield Difference(Kind.NEW, now.name, name, now=str(new[name].verdict))
            continue
        if _worse(new[name].verdict, old[name].verdict):
            said = str(old[name].verdict), str(new[name].verdict)
            yield Difference(Kind.WORSE, now.name, name, *said)
        if _grew(new[name].ratio, old[name].ratio):
            said = ratio_text(old[name].ratio), ratio_text(new[name].ratio)
            yield Difference(Kind.GREW, now.name, name, *said)
    for name in old:
        if name not in new:
            yield Difference(Kind.GONE, now.name, name, str(old[name].verdict))


def _tensors(tensors: Sequence[TensorVerdict]) -> Mapping[str, TensorVerdict]:
    """Return tensors by name; the second of a name is ``"name (2)"``."""
    found: dict[str, TensorVerdict] = {}
    for one in tensors:
        name, n = one.name, 1
        while name in found:
            n += 1
            name = f"{one.name} ({n})"
        found[name] = one
    return found


def _worse(now: Verdict | None, before: Verdict | None) -> bool:
    if now is None or before is None or now is before:
        return False
    return worst(TensorVerdict("", verdict) for verdict in (now, before)) is now


def _grew(now: float, before: float) -> bool:
    if math.isnan(now) or math.isnan(before):
        return False
    return now > GROWTH * (before or 1.0)


def _said(check: CheckResult) -> str:
    if check.skipped:
        return f"skipped: {check.skipped}"
    return f"error: {check.error}" if check.error else str(check.verdict)
