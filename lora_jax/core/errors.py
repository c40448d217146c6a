"""The errors that users of ``lora_jax`` see; each message says what to do."""

from __future__ import annotations

from collections.abc import Iterable

from .shown_text import listed


class LoraError(ValueError):
    """Base class of every error that ``lora_jax`` raises on purpose.

    Its ``problems`` are what the message lists, a line each; none where it says one thing.
    """

    problems: tuple[str, ...] = ()


class ConfigError(LoraError):
    """A ``LoraConfig`` whose fields are out of range or contradict each other."""


class PlanError(LoraError):
    """A target that matches nothing, or a use of a weight that has no rule."""


class AdapterError(LoraError):
    """Adapters, or an adapter file, that do not fit the model or cannot be read."""


class AssetError(LoraError):
    """A model or data file that is missing, unreachable or not what it should be."""


class DataError(LoraError):
    """Training or prediction data that cannot be used as it is."""


class TrainingError(LoraError):
    """Training that cannot go on, such as a loss that is not finite."""


class OutputError(LoraError):
    """An output path that cannot be written or already holds something."""


class ParityError(LoraError):
    """A comparison of two frameworks that cannot be made as it was asked for."""


def raise_all(
    error: type[LoraError], heading: str, problems: Iterable[str], *, more: int = 0
) -> None:
    """Raise one ``error`` that lists the problems; do nothing when there is none.

    The message shows the first 20, each on one line and without control characters, and how many
    more there are; the error's ``problems`` hold them all.

    Args:
        error: what is raised.
        heading: what they have in common.
        problems: a line each.
        more: how many there are beside these.

    >>> raise_all(LoraError, "bad fields", [])
    >>> raise_all(LoraError, "bad fields", ["r: got 0", "bias: got 'x'"])
    Traceback (most recent call last):
        ...
    lora_jax.core.errors.LoraError: bad fields:
      r: got 0
      bias: got 'x'
    """
    problems = tuple(problems)
    if problems:
        raised = error(f"{heading}:\n  " + "\n  ".join(listed(problems, more=more)))
        raised.problems = problems
        raise raised
