"""The table of what the laws are tested on: ``python -m parity_tests.laws.laws_table`` writes it.

It is made from the tests' own tables, so it says what runs and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_jax.parity.suite.torch_models import MODELS
from parity_tests.laws import laws, test_frameworks, test_laws
from parity_tests.models import test_third_party, third_party

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"

HEAD = """# What the laws are tested on

Written by `python -m parity_tests.laws.laws_table`, from the tests' own tables.

- identity: with B = 0 the outputs are the base's, bit for bit op by op, within 1e-6 under `jit`.
- merging: the merged weights give the same outputs.
- gradient: A and B get the chain rule's share of the merged weight's gradient.
- frugality: the compiled step computes nothing of a weight's size beyond what the base does.
- purity: the parameters are bitwise unchanged, and op by op the values are the compiled ones.
- transforms: `jit`, `checkpoint` and `vmap` over adapters change nothing.
- planning: axes and sites are read off the function; nothing is skipped.
- agreement: what planning accepts the call does, what it refuses the call refuses; with
  `all-linear`, DoRA, biases and `on_unsupported`, and under `jit` with static arguments.

`dW` marks subjects in which an author's own derivative forms the weight's gradient, `W + AB` those
where the sum is formed because it was asked for.
"""


def page() -> str:
    """Return the page as Markdown."""
    operations = [(s, laws.ALL) for s in test_laws.SUBJECTS]
    frameworks = [(s, laws.ALL) for s in test_frameworks.SUBJECTS]
    models = [
        (s, [laws.identity, *test_third_party.LAWS, laws.planning, laws.agreement])
        for s in third_party.ALL
    ]
    return "\n".join(
        [
            HEAD,
            _table("Operations", "operation", operations),
            _table("Frameworks", "model", frameworks),
            _table("Models that others wrote, unmodified", "model", models),
            _through_torch(),
        ]
    )


def _through_torch() -> str:
    lines = ["| model | targets | outputs | loss | gradients | merged | PEFT's file | identity |"]
    lines += ["|---" * 8 + "|"]
    for name, model in MODELS.items():
        lines.append(f"| `{name}` | {', '.join(model.targets)} |{' yes |' * 6}")
    return (
        "## PyTorch models of transformers through `from_torch`, against PEFT\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _table(
    title: str, heading: str, rows: Sequence[tuple[laws.Subject, Sequence[Callable[..., None]]]]
) -> str:
    names = [law.__name__ for law in laws.ALL]
    lines = [f"| {heading} | axes | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for subject, tested in rows:
        marks = {law.__name__: "yes" for law in tested}
        if "frugality" in marks and subject.dense_gradient:
            marks["frugality"] = "dW"
        if "frugality" in marks and subject.materialized:
            marks["frugality"] = "W + AB"
        axes = ", ".join(sorted(set(subject.axes.values())))
        cells = " | ".join(marks.get(name, "") for name in names)
        lines.append(f"| `{subject}` | {axes} | {cells} |")
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
