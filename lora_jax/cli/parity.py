"""``lora-jax parity``: the standard suite, or a pair of the user's functions, and the report."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, ParityError, raise_all
from ..core.io.atomic_files import output_directory, write_atomic
from ..core.io.intake import read_bytes, reason
from ..core.shown_text import escaped
from ..core.text_tables import table
from ..parity.compare import compare
from ..parity.mutants.gate import SUITE, KillMatrix, by_judge, compiled_once, gate, gate_checks
from ..parity.reports.checks import LEVELS, Check, CheckResult
from ..parity.reports.differences import differences
from ..parity.reports.markdown import to_markdown
from ..parity.reports.page import to_html
from ..parity.reports.report import Report, environment, from_json, to_json
from ..parity.reports.summary import PAIR, ratio_text, sentences
from ..parity.reports.templating import INSTALL
from ..train import option_limits
from ..train.option_limits import Range
from .objects import load, load_inputs, said_where

# Where the suite's report goes if nothing else is said.
OUTPUT = Path("runs/parity")

# The level of the checks that trajectories belong to.
TRAJECTORY = 4

INSTALLS = {"torch": 'pip install "lora_jax[torch]"', "jinja2": INSTALL}

_HEADINGS = ("tensor", "verdict", "jax", "torch", "ratio", "bound", "slope", "shape", "dtype")


@dataclass(frozen=True)
class ParityOptions:
    """Hold JAX to PyTorch: the standard suite, or with --jax and --torch a pair of your own.

    Ends with 1 on MISMATCH, BIASED or VACUOUS, with 2 on wrong usage. Functions are named
    `pkg.mod:fn` and looked for from the current directory.

    Args:
        levels: of the suite, such as `0,1`; all of them if not given.
        only: checks of the suite whose names hold this text, or match it where it has a `*`.
        seed: of everything that is drawn.
        output: where report.json, report.md and report.html go; `runs/parity` for the suite,
            nowhere for a pair, if not given.
        overwrite: replace an earlier report in that directory; other files stay.
        against: the report.json of an earlier run, to compare this one with.
        jax: your function in JAX: takes the inputs as keywords and returns arrays.
        torch: the same in PyTorch, or a module.
        inputs: `.npz` or `.safetensors`, where `params.w` is w in the keyword params; or
            `pkg.mod:make`, called without arguments for a dict of arrays.
        mapping: `pkg.mod:name` of PyTorch's names and layouts by JAX's, see
            lora_jax.parity.compare.
        oracle: `pkg.mod:fn` of the truth in numpy, see lora_jax.parity.compare.
        mutants: also plant the bugs of lora_jax.parity.mutants, one at a time, and show what
            finds each in the report; ends with 1 if one is not found. Takes minutes.
    """

    levels: str | None = None
    only: str | None = None
    seed: int = 0
    output: Path | None = None
    overwrite: bool = False
    against: Path | None = None
    jax: str | None = None
    torch: str | None = None
    inputs: str | None = None
    mapping: str | None = None
    oracle: str | None = None
    mutants: bool = False


@dataclass(frozen=True)
class Prepared:
    """What is checked before anything runs, so that no run is lost to bad usage.

    Args:
        checks: of the suite; the one of the pair.
        pair: whether they are the user's.
        directory: where the report goes; None for nowhere.
        earlier: what it is compared with.
        trajectories: what is drawn beside the suite's level 4, from a seed.
    """

    checks: Sequence[Check]
    pair: bool
    directory: Path | None
    earlier: Report | None
    trajectories: Mapping[str, Callable[[int], Any]]


def prepare(options: ParityOptions) -> Prepared:
    """Read and check all that the options name.

    Raises:
        ParityError: options that contradict each other, names that lead nowhere, inputs or an
            earlier report that cannot be read, packages that are missing.
        OutputError: the directory holds files, or cannot be written.
    """
    seeds = [Range("seed", options.seed, 0, option_limits.SEED)]
    raise_all(ConfigError, "these options are out of range", option_limits.problems(seeds))
    pair = _is_pair(options)
    directory = options.output or (None if pair else OUTPUT)
    needed = ["torch", *(["jinja2"] if directory else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    raise_all(ParityError, "packages are missing", (f"{n}: {INSTALLS[n]}" for n in missing))
    earlier = None if options.against is None else read_report(options.against)
    if pair:
        checks, drawn = [pair_check(options)], {}
    else:
        from ..parity.suite import CHECKS, TRAJECTORIES

        checks = select(CHECKS, options.levels, options.only)
        # They belong to the level whole, so a part of it has none.
        wanted = options.only is None and any(check.level == TRAJECTORY for check in checks)
        drawn = TRAJECTORIES if wanted else {}
    if directory is not None:
        directory = output_directory(directory, overwrite=options.overwrite)
    return Prepared(checks, pair, directory, earlier, drawn)


def plant(options: ParityOptions, say: Callable[[str], object]) -> KillMatrix | None:
    """Plant the bugs where that was asked for; ``say`` is told each one's fate as it comes."""
    if not options.mutants:
        return None
    from ..parity.mutants import MUTANTS
    from ..parity.mutants.common_tests import common_tests

    with compiled_once():
        return gate(
            MUTANTS,
            gate_checks(),
            common=common_tests(),
            seed=options.seed,
            say=say,
        )


def finish(
    prepared: Prepared,
    results: Sequence[CheckResult],
    seed: int,
    matrix: KillMatrix | None = None,
) -> tuple[Report, str]:
    """Write the report where it was asked for, and return it with what is printed."""
    drawn = {name: make(seed).to_dict() for name, make in prepared.trajectories.items()}
    kills = {} if matrix is None else by_judge(matrix)
    report = Report(environment(seed), tuple(results), drawn, kills)
    lines = sentences(report) + ([] if matrix is None else _fates(matrix))
    if prepared.pair:
        lines = [_tensors(results[0]), "", *lines]
    for check in results:
        bad = [str(one) for one in check.tensors if not one.verdict.ok]
        lines += [escaped(f"{check.name}: {said}") for said in (check.error, *bad) if said]
    if prepared.earlier is not None:
        found = [escaped(one) for one in differences(report, prepared.earlier)]
        lines += ["since the earlier report:", *(found or ["nothing changed"])]
    if prepared.directory is not None:
        write_report(report, prepared.directory, prepared.earlier)
        lines.append(f"the report is in {prepared.directory / 'report.html'}")
    return report, "\n".join(lines)


def write_report(report: Report, directory: Path, earlier: Report | None = None) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``, all of them or none."""
    texts = {
        "report.json": to_json(report),
        "report.md": to_markdown(report, earlier),
        "report.html": to_html(report, earlier),
    }
    write_atomic({directory / name: text.encode() for name, text in texts.items()})


def read_report(path: Path) -> Report:
    """Return an earlier report.

    Raises:
        ParityError: it cannot be read or is none.
    """
    try:
        return from_json(read_bytes(path).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ParityError(f"cannot read {path}: {reason(error)}") from error


def select(checks: Sequence[Check], levels: str | None, only: str | None) -> list[Check]:
    """Return the checks of these levels whose names hold or match a text.

    Raises:
        ParityError: lists every level that is none; or nothing is left, with close names.

    >>> demo = [Check("a/float32", 1, lambda seed: []), Check("b/float32", 2, lambda seed: [])]
    >>> [str(check) for check in select(demo, "1,2", "b*")]
    ['b/float32']
    """
    words = [] if levels is None else [word.strip() for word in levels.split(",")]
    known = {str(level): level for level in LEVELS}
    raise_all(
        ParityError,
        f"levels are {', '.join(known)}",
        (f"got {word!r}" for word in words if word not in known),
    )
    wanted = {known[word] for word in words} or set(LEVELS)
    found = [check for check in checks if check.level in wanted]
    if only is not None:
        pattern = only if "*" in only else f"*{only}*"
        found = [check for check in found if fnmatch.fnmatchcase(check.name, pattern)]
    if not found:
        names = [check.name for check in checks]
        close = difflib.get_close_matches(only or "", names, cutoff=0.3) or names[:3]
        raise ParityError(f"no check is left; there are for example {', '.join(close)}")
    return found


def pair_check(options: ParityOptions) -> Check:
    """Return the user's pair as a check.

    Raises:
        ParityError: a name leads nowhere, or the inputs cannot be read.
    """
    ours = load(str(options.jax), "--jax", call=True)
    theirs = _torch_function(load(str(options.torch), "--torch", call=True))
    mapping = None if options.mapping is None else load(options.mapping, "--mapping")
    oracle = None if options.oracle is None else load(options.oracle, "--oracle", call=True)
    inputs = load_inputs(str(options.inputs))

    def run(seed: int) -> Any:
        with said_where():
            found = compare(ours, theirs, inputs, mapping=mapping, oracle=oracle, seed=seed)
        return found.tensors

    return Check(f"{options.jax} / {options.torch}", PAIR, run)


def run_pair(check: Check, seed: int) -> CheckResult:
    """Run the user's pair; what it raises is wrong usage, not a verdict.

    Raises:
        ParityError: the comparison cannot be made.
    """
    begin = time.perf_counter()
    tensors = tuple(check.run(seed))
    return CheckResult(check.name, check.level, tensors, time.perf_counter() - begin)


def _is_pair(options: ParityOptions) -> bool:
    """Tell whether the options name a pair; raise where they name half of one."""
    needed = {"--jax": options.jax, "--torch": options.torch, "--inputs": options.inputs}
    more = {"--mapping": options.mapping, "--oracle": options.oracle}
    suite = {"--levels": options.levels, "--only": options.only}
    suite |= {"--mutants": options.mutants or None}
    if not any(value is not None for value in (needed | more).values()):
        return False
    raise_all(
        ParityError,
        "a pair takes --jax, --torch and --inputs, and nothing of the suite",
        [f"{name}: missing" for name, value in needed.items() if value is None]
        + [f"{name}: of the suite" for name, value in suite.items() if value is not None],
    )
    return True


def _fates(matrix: KillMatrix) -> list[str]:
    found, count = matrix.caught[SUITE], len(by_judge(matrix))
    return [
        f"Of {count} planted bugs {found} are found.",
        *(f"{name}: planted and not found" for name in matrix.surviving),
        *(f"{said}: an alarm without a bug" for said in matrix.alarms),
    ]


def _torch_function(found: Any) -> Callable[..., Any]:
    import torch

    from ..parity.sides.torch_side import ModuleFn

    return ModuleFn(found) if isinstance(found, torch.nn.Module) else found


def _tensors(check: CheckResult) -> str:
    rows = [
        (
            one.name,
            str(one.verdict),
            *(f"{value:.2e}" for value in (one.jax, one.torch)),
            ratio_text(one.ratio),
            f"{one.bound:.2e}",
            f"{one.slope:+.1e}",
            "×".join(map(str, one.shape)) or "scalar",
            one.dtype,
        )
        for one in check.tensors
    ]
    return table(_HEADINGS, rows)
