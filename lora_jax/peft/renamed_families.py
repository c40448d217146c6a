"""Names that transformers itself changed between versions (LLaVA and its kin), as a table.

Until its version 4.52 the language model of a LLaVA was ``language_model.model``, and then
``model.language_model``; checkpoints keep the first names, running models have the second, and
adapters those of their day. A row has the beginnings of names on two sides, either of which may be
the file's. Names that no beginning fits are the same on both sides.

Idefics 2 and 3 have had the same names all the time; their row is for their language model alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..core import paths
from .spellings import owner

Pairs = tuple[tuple[str, str], ...]

_TOWERS = ("vision_tower", "vision_model", "multi_modal_projector", "image_newline")
_TOWERS += ("image_tower", "video_tower", "vision_embed_tokens")

_LLAVA_ALIKE = "LLaVA, PaliGemma, Gemma 3, InternVL, Mistral 3, Mllama and their kin"
_FIRST_LLAVA = {
    "model.vision_tower.vision_tower": "vision_tower",
    "model.mm_projector.0": "multi_modal_projector.linear_1",
    "model.mm_projector.2": "multi_modal_projector.linear_2",
}

# The family, and the beginnings of names on the one side and on the other.
FAMILIES: tuple[tuple[str, Pairs], ...] = (
    (
        _LLAVA_ALIKE,
        (
            ("language_model.model", "model.language_model"),
            ("language_model.lm_head", "lm_head"),
            *((one, f"model.{one}") for one in _TOWERS),
        ),
    ),
    ("Qwen2-VL and Qwen2.5-VL", (("model", "model.language_model"), ("visual", "model.visual"))),
    (
        "Emu3",
        (
            ("text_model.model", "model.text_model"),
            ("text_model.lm_head", "lm_head"),
            ("vqmodel", "model.vqmodel"),
        ),
    ),
    (
        "LLaVA in its authors' names",
        (
            *_FIRST_LLAVA.items(),
            ("model", "language_model.model"),
            ("lm_head", "language_model.lm_head"),
        ),
    ),
    (
        "LLaVA in its authors' names",
        (
            *((own, f"model.{new}") for own, new in _FIRST_LLAVA.items()),
            ("model", "model.language_model"),
        ),
    ),
    (
        "the language model of a LLaVA alone",
        (("language_model.model", "model"), ("language_model.lm_head", "lm_head")),
    ),
    ("the language model of an Idefics alone", (("model.text_model", "model"),)),
    ("DistributedDataParallel", (("module", ""),)),
)


@dataclass(frozen=True)
class Rename:
    """How the names of a file become those of a model.

    Args:
        family: whose names they are.
        pairs: the beginnings in the file and in the model.
    """

    family: str
    pairs: Pairs

    def to_model(self, name: str) -> str:
        """Return what the model calls a module or tensor of the file."""
        return _begun(name, self.pairs)

    def to_file(self, name: str) -> str:
        """Return what the file calls a module or tensor of the model."""
        return _begun(name, [(there, here) for here, there in self.pairs])

    def of_path(self, path: str) -> str:
        """Return the file's name of a parameter's module: a function for ``names=…``."""
        return self.to_file(paths.module_of(path))

    def told(self, file: Iterable[str]) -> str:
        """Return a sentence that says which beginnings of a file's names are read as which."""
        every = {_pair(name, self.pairs) for name in file}
        read = ", ".join(
            f"{here or '(none)'} as {there or '(none)'}"
            for here, there in sorted(every)
            if here != there
        )
        return f"names of {self.family} are read as the model's: {read}"


def find(file: Collection[str], model: Collection[str], *, whole: bool = False) -> Rename | None:
    """Return the one way in which all names of a file become names of the model.

    None where they are the model's as they are, where no row fits all of them, and where two
    rows fit in different ways.

    Args:
        file: the names of the file's modules.
        model: those of the model's.
        whole: whether every one of the model's must be reached, too.

    >>> found = find(["language_model.model.layers.0.q"], ["model.language_model.layers.0.q"])
    >>> found.to_model("language_model.model.layers.0.q")
    'model.language_model.layers.0.q'
    >>> find(["model.layers.0.q"], ["model.layers.0.q"])
    """
    own = set(model) | {name.rpartition(".")[0] for name in model}
    if not file or own.issuperset(file):
        return None
    found: dict[tuple[str, ...], Rename] = {}
    for family, pairs in FAMILIES:
        for way in (pairs, tuple((there, here) for here, there in pairs)):
            one = Rename(family, way)
            names = [one.to_model(name) for name in file]
            back = [one.to_file(name) for name in names]
            if own.issuperset(names) and back == list(file) and (not whole or _all(model, names)):
                found.setdefault(tuple(names), one)
    return next(iter(found.values())) if len(found) == 1 else None


def modules_of(keys: Iterable[str]) -> list[str]:
    """Return the modules that own the tensors of a PEFT file, sorted.

    >>> modules_of(["base_model.model.a.q.lora_A.weight", "base_model.model.head.weight"])
    ['a.q', 'head']
    """
    return sorted({owner(key) for key in keys})


def _all(model: Iterable[str], names: Iterable[str]) -> bool:
    reached = set(names)
    return all(name in reached or name.rpartition(".")[0] in reached for name in model)


def _pair(name: str, pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Return the row whose beginning fits a name; the longest counts."""
    fitting = [pair for pair in pairs if not pair[0] or f"{name}.".startswith(f"{pair[0]}.")]
    return max(fitting, key=lambda pair: len(pair[0]), default=("", ""))


def _begun(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    here, there = _pair(name, pairs)
    rest = name[len(here) :].removeprefix(".")
    return ".".join(filter(None, [there, rest]))
