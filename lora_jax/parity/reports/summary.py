"""A report in few words: the sentence at its top, and the grid of checks and quantities."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..verdicts import TensorVerdict, Verdict, worst
from .checks import CheckResult
from .report import Report

# A grid has this many columns; what fewest checks have is gathered in the last.
MOST_COLUMNS = 9
OTHERS = "others"

# The level of a comparison that is none of the suite's but the user's own.
PAIR = -1


@dataclass(frozen=True)
class Cell:
    """What one check says of one quantity.

    Args:
        verdict: the worst of its tensors'.
        ratio: the largest of JAX's error over PyTorch's; NaN where both are exact.
        tensors: the places of its tensors in the check.
    """

    verdict: Verdict
    ratio: float
    tensors: tuple[int, ...]


def sentences(report: Report) -> list[str]:
    """Return what a reader wants first: the worst verdict, and who is further from the truth.

    >>> check = CheckResult("demo", 1, (TensorVerdict("y", Verdict.ORDER_ONLY, 3e-8, 2e-8),))
    >>> for line in sentences(Report({}, [check])):
    ...     print(line)
    The worst verdict is ORDER-ONLY: the 1 check that ran holds.
    In 1 of 1 tensors JAX is further from the truth, in 0 PyTorch, in 0 neither; the median of
    JAX's error over PyTorch's is 1.50.
    """
    ran = [check for check in report.checks if check.verdict is not None]
    if not ran:
        return ["No check ran, so this report says nothing."]
    bad = [check for check in ran if not _holds(check)]
    found = worst_of(ran)
    if bad:
        names = ", ".join(check.name for check in bad[:3]) + (", …" if len(bad) > 3 else "")
        first = f"The worst verdict is {found}: {len(bad)} of {len(ran)} checks fail ({names})."
    else:
        all_of = "the 1 check that ran holds" if len(ran) == 1 else f"all {len(ran)} checks hold"
        first = f"The worst verdict is {found}: {all_of}."
    tensors = [one for check in ran for one in check.tensors]
    return [first, _further(tensors, report.ratio), *_skipped(report)]


def worst_of(checks: Iterable[CheckResult]) -> Verdict:
    """Return the worst verdict of several checks; ``VACUOUS`` where none ran."""
    verdicts = [check.verdict for check in checks if check.verdict is not None]
    return worst(TensorVerdict("", verdict) for verdict in verdicts)


def quantity(name: str) -> str:
    """Return what kind of tensor a name is of: its first word, or its last part after a dot.

    >>> quantity("dA 5×7×3×11"), quantity("model.layers.0.q_proj.lora_A"), quantity("y")
    ('dA', 'lora_A', 'y')
    """
    first = name.split()[0] if name.split() else name
    return first.rsplit(".", 1)[-1]


def columns(checks: Sequence[CheckResult]) -> list[str]:
    """Return the quantities of these checks in order of first sight, at most ``MOST_COLUMNS``."""
    each = [dict.fromkeys(quantity(one.name) for one in check.tensors) for check in checks]
    seen = Counter(name for names in each for name in names)
    order = list(seen)
    if len(order) <= MOST_COLUMNS:
        return order
    kept = {name for name, _ in seen.most_common(MOST_COLUMNS - 1)}
    return [name for name in order if name in kept] + [OTHERS]


def cells(check: CheckResult, names: Sequence[str]) -> dict[str, Cell]:
    """Return the cell of every column that the check has tensors of."""
    places: dict[str, list[int]] = {}
    for place, one in enumerate(check.tensors):
        name = quantity(one.name)
        places.setdefault(name if name in names else OTHERS, []).append(place)
    return {
        name: Cell(
            worst(check.tensors[place] for place in found),
            largest_ratio(check.tensors[place] for place in found),
            tuple(found),
        )
        for name, found in places.items()
    }


def largest_ratio(tensors: Iterable[TensorVerdict]) -> float:
    """Return the largest of JAX's error over PyTorch's; NaN where there is none."""
    return max((one.ratio for one in tensors if not math.isnan(one.ratio)), default=math.nan)


def median_ratio(checks: Iterable[CheckResult]) -> float:
    """Return the median of JAX's error over PyTorch's; NaN where there is none."""
    ratios = [one.ratio for check in checks for one in check.tensors if one.ratio > 0]
    return statistics.median_low(ratios) if ratios else math.nan


def ratio_text(ratio: float) -> str:
    """Return a ratio in at most five characters.

    >>> [ratio_text(value) for value in (0.987, 12.34, 5321.0, math.inf, math.nan)]
    ['0.99', '12.3', '5e+03', '∞', '–']
    """
    if math.isnan(ratio):
        return "–"
    if math.isinf(ratio):
        return "∞"
    if ratio < 10:
        return f"{ratio:.2f}"
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0e}" if ratio >= 1000 else f"{ratio:.0f}"


def caught(said: object) -> bool | None:
    """Return whether a test that said this of a mutant has caught it; None where it did not run.

    >>> [caught(said) for said in ("MISMATCH", "ORDER-ONLY", True, "caught", "error", None)]
    [True, False, True, True, True, None]
    """
    if said is None or said == "":
        return None
    if isinstance(said, bool):
        return said
    if said in set(Verdict):
        return not Verdict(str(said)).ok
    return str(said).lower() not in ("false", "missed", "survived", "no", "passed")


def judges(kills: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the tests of a kill matrix, in order of first sight."""
    return list(dict.fromkeys(test for said in kills.values() for test in said))


def _holds(check: CheckResult) -> bool:
    return check.verdict is not None and check.verdict.ok


def _further(tensors: Sequence[TensorVerdict], ratio: float) -> str:
    count = Counter(one.further for one in tensors)
    said = (
        f"In {count['jax']:,} of {len(tensors):,} tensors JAX is further from the truth, in "
        f"{count['torch']:,} PyTorch, in {count['neither']:,} neither"
    )
    if math.isnan(ratio):
        return f"{said}."
    return f"{said}; the median of JAX's error over PyTorch's is {ratio_text(ratio)}."


def _skipped(report: Report) -> list[str]:
    reasons = Counter(check.skipped for check in report.checks if check.skipped)
    return [
        f"{count} {'check was' if count == 1 else 'checks were'} skipped: {reason}."
        for reason, count in reasons.items()
    ]
