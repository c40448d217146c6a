"""The ``lora-jax`` command: its options, and what calls whom; the work is done elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__, cli
from ..core.config.lora_config import ALL_LINEAR, LoraConfig
from ..core.errors import LoraError
from ..core.extras import require
from ..core.io import signals
from ..core.shown_text import escaped, in_json
from ..models import plan_model
from ..parity.reports.checks import run_check
from ..train.finetune import FinetuneOptions, finetune
from ..train.loop import Interrupted, NotFinite
from ..train.predict import Prediction, merge_to, predict
from ..train.reading import read_texts
from . import parity, stdout
from .console import Reporter, Unbreakable, counted, silence, summarise, warn

DESCRIPTION = """LoRA fine-tuning in JAX, with PEFT's adapter files.

Without options, `lora-jax finetune` trains all-MiniLM-L6-v2 on the SMS Spam Collection.
`lora-jax SUBCOMMAND --help` lists what each takes, `lora-jax --version` says which this is."""

BAD_INPUT, BROKEN_OFF, DIFFERENT, PIPE_CLOSED = 2, 1, 1, 141


@dataclass(frozen=True)
class PredictOptions:
    """Classify texts with a saved adapter: one line each, label, probability and text.

    Args:
        directory: the output directory of `lora-jax finetune`.
        texts: what to classify.
        data: .csv, .tsv or .jsonl table with more texts.
        text_column: column or JSON key of the texts in the table.
        json: print one JSON object for each text, with the probability of every class.
        model: the base model, if it is no longer where the adapter says.
        batch_size: texts at a time.
        cache: where downloads are kept; if not given, LORA_JAX_CACHE or the user's cache.
    """

    directory: Path
    texts: tuple[str, ...]
    data: Path | None = None
    text_column: str = "text"
    json: bool = False
    model: str | None = None
    batch_size: int = 16
    cache: Path | None = None


@dataclass(frozen=True)
class MergeOptions:
    """Write base model and adapter as one model that plain transformers loads.

    Args:
        paths: DIRECTORY OUT, with the output directory of `lora-jax finetune`; or MODEL ADAPTER
            OUT, with a directory of safetensors files and any adapter of PEFT's for it. OUT is a
            new or empty directory.
        overwrite: replace files of the same name; others stay.
        model: of `finetune`'s output: the base model, if it is no longer where the adapter says.
        cache: of `finetune`'s output: where downloads are kept; if not given, LORA_JAX_CACHE or
            the user's cache.
    """

    paths: tuple[Path, ...]
    overwrite: bool = False
    model: str | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class PlanOptions:
    """Show what LoRA does to a model: every parameter, adapted or why not, and the totals.

    Args:
        model: a directory, `minilm`, or a hub id.
        target_modules: names that match exactly or as a suffix; `all-linear` for every linear
            layer but the output head.
        exclude_modules: names taken out of the targets.
        r: rank of A and B.
        lora_alpha: numerator of the scale alpha / r.
        materialize: form W + AB where a use has no rule, instead of an error.
        cache: where downloads are kept; if not given, LORA_JAX_CACHE or the user's cache.
    """

    model: str
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    exclude_modules: tuple[str, ...] = ()
    r: int = 8
    lora_alpha: int | float = 16
    materialize: bool = False
    cache: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done. 1: training broke down, the last good adapters are saved; or JAX and PyTorch differ.
    2: bad usage or input, said in one message. 130, 143 and 129: ended by Ctrl-C, SIGTERM or
    SIGHUP. 141: nobody reads the output any more.

    Args:
        argv: the arguments; those of the process when not given.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with stdout.plainly():
        return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        if argv in (["--version"], ["-V"]):
            stdout.show(f"lora-jax {__version__}")
            return 0
        with signals.ending():
            with stdout.short_usage():
                options = _parse(argv)
            return _COMMANDS[type(options)](options)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            return _fail(stop.code, BAD_INPUT)
        return stop.code if stop.code is not None else 0
    except LoraError as error:
        return _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt as stop:
        return _fail(signals.interrupted(stop), signals.exit_code(stop))
    except BrokenPipeError:
        silence(sys.stdout)  # Whoever read the output has enough.
        return PIPE_CLOSED
    except stdout.UNFORESEEN as error:
        return _fail(stdout.unforeseen(error), BAD_INPUT)


def _parse(argv: list[str]) -> Any:
    require("tyro", "rich")
    import tyro

    return tyro.extras.subcommand_cli_from_dict(
        {
            "finetune": FinetuneOptions,
            "predict": PredictOptions,
            "merge": MergeOptions,
            "plan": PlanOptions,
            "inspect": cli.InspectOptions,
            "combine": cli.CombineOptions,
            "diff": cli.DiffOptions,
            "convert": cli.ConvertOptions,
            "parity": cli.ParityOptions,
        },
        prog="lora-jax",
        description=DESCRIPTION,
        args=argv,
        config=(
            tyro.conf.PositionalRequiredArgs,
            tyro.conf.PositionalMetavarFromFieldName,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
        ),
    )


def _finetune(options: FinetuneOptions) -> int:
    from rich.console import Console

    # Training goes on where nobody reads what it says any more.
    file = Unbreakable(sys.stdout, f"nobody reads the output; results go to {options.output}")
    console = Console(file=file, highlight=False, markup=False, soft_wrap=True)  # pyright: ignore
    data = "the SMS Spam Collection" if options.data is None else options.data
    where = map(escaped, (options.model, data, options.output))
    console.print("LoRA on {} with {}; results go to {}".format(*where))
    saved = f"the adapter is saved in {options.output}"
    reporter = Reporter(console, options.epochs)
    try:
        with reporter:
            result = finetune(options, reporter)
    except NotFinite as error:
        return _fail(f"{error}\n{saved}", BROKEN_OFF)
    except Interrupted as stop:
        said = f"{signals.interrupted(stop)} after step {stop.trained.steps}; {saved}"
        return _fail(said, signals.exit_code(stop))
    except KeyboardInterrupt as stop:
        known = saved if reporter.saved else "nothing was trained yet"
        return _fail(f"{signals.interrupted(stop)}; {known}", signals.exit_code(stop))
    summarise(console, result, options)
    return 0


def _predict(options: PredictOptions) -> int:
    texts = options.texts
    if options.data is not None:
        texts += read_texts(options.data, options.text_column)
    found = predict(
        options.directory,
        texts,
        model=options.model,
        batch_size=options.batch_size,
        cache=options.cache,
        note=_note,
    )
    stdout.write("\n".join(map(_as_json if options.json else _as_row, found)))
    return 0


def _as_json(prediction: Prediction) -> str:
    text = in_json(vars(prediction))
    return text if stdout.takes(text) else json.dumps(vars(prediction))


def _as_row(prediction: Prediction) -> str:
    # A line is a text, so what ends a line or a field in it becomes a space.
    text = " ".join(prediction.text.split())
    cells = (prediction.label, f"{prediction.probability:.4f}", text)
    return "\t".join(map(escaped, cells))


def _merge(options: MergeOptions) -> int:
    if len(options.paths) == 3:
        beside = {"--model": options.model, "--cache": options.cache}
        if odd := [name for name, value in beside.items() if value is not None]:
            return _fail(f"{', '.join(odd)}: of DIRECTORY OUT, not of MODEL ADAPTER OUT", BAD_INPUT)
        stdout.show(cli.merge_files(*options.paths, overwrite=options.overwrite))
        return 0
    if len(options.paths) != 2:
        return _fail("merge takes DIRECTORY OUT, or MODEL ADAPTER OUT", BAD_INPUT)
    directory, out = options.paths
    out = merge_to(
        directory,
        out,
        overwrite=options.overwrite,
        model=options.model,
        cache=options.cache,
        note=_note,
    )
    load = f"transformers.AutoModelForSequenceClassification.from_pretrained({str(out)!r})"
    stdout.show(f"the merged model is in {escaped(out)}; load it with\n{load}")
    return 0


def _plan(options: PlanOptions) -> int:
    names = options.target_modules
    if not names:
        return _fail(f"target_modules: got no name, wanted some, or {ALL_LINEAR}", BAD_INPUT)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=ALL_LINEAR if names == (ALL_LINEAR,) else names,
        exclude_modules=options.exclude_modules or None,
        on_unsupported="materialize" if options.materialize else "error",
    )
    stdout.show(str(plan_model(options.model, config, cache=options.cache, note=_note)))
    return 0


def _parity(options: cli.ParityOptions) -> int:
    prepared = parity.prepare(options)
    results = [
        parity.run_pair(check, options.seed) if prepared.pair else run_check(check, options.seed)
        for check in counted(prepared.checks)
    ]
    matrix = parity.plant(options, _note)
    report, text = parity.finish(prepared, results, options.seed, matrix)
    stdout.show(text)
    return 0 if report.ok and (matrix is None or matrix.ok) else DIFFERENT


def _printed(text_of: Callable[[Any], str]) -> Callable[[Any], int]:
    def run(options: Any) -> int:
        stdout.show(text_of(options))
        return 0

    return run


_COMMANDS: dict[type, Callable[[Any], int]] = {
    FinetuneOptions: _finetune,
    PredictOptions: _predict,
    MergeOptions: _merge,
    PlanOptions: _plan,
    cli.InspectOptions: _printed(cli.inspect_files),
    cli.CombineOptions: _printed(cli.combine_files),
    cli.DiffOptions: _printed(cli.diff_files),
    cli.ConvertOptions: _printed(cli.convert_files),
    cli.ParityOptions: _parity,
}


def _note(text: str) -> None:
    with contextlib.suppress(OSError):
        print(stdout.message(text), file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    warn(stdout.message(message))
    return code


if __name__ == "__main__":
    sys.exit(main())
