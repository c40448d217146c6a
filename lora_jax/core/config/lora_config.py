"""``LoraConfig``: PEFT's field names and the rules that resolve them for one module."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from .. import token_indices
from ..errors import ConfigError, raise_all
from ..paths import module_of
from . import endless_regexes
from .endless_regexes import in_layers, suffixed
from .peft_fields import FOREIGN, refused
from .problems import expressions, problems

ALL_LINEAR = "all-linear"

# PEFT finds the output head through the model class; a pytree has only names.
OUTPUT_HEADS = ("lm_head", "embed_out", "score", "classifier")

T = TypeVar("T")

_SEQUENCES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "on_unsupported",
    "alora_invocation_tokens",
    "target_parameters",
    "transposed_parameters",
)

_OUT_OF_RANGE = "these LoraConfig fields are out of range"


def _knows_every_field(cls: type[T]) -> type[T]:
    """Let a dataclass take every field of PEFT's: those that it has not must be at defaults."""
    init, own = cls.__init__, {one.name for one in fields(cls)}  # pyright: ignore[reportArgumentType]

    @functools.wraps(init)
    def with_every_field(self: T, *args: Any, **given: Any) -> None:
        mine = {name: given.pop(name) for name in own & given.keys()}
        found = refused(given) + _unknown(given)
        try:
            init(self, *args, **mine)
        except ConfigError as error:
            found = [*error.problems, *found]
        raise_all(ConfigError, _OUT_OF_RANGE, found)

    cls.__init__ = with_every_field
    return cls


@_knows_every_field
@dataclass(frozen=True)
class LoraConfig:
    """How to adapt a model; every field has PEFT's name, meaning and default.

    Every other field of PEFT 0.21.2's may be given as well, at its default: a value that asks for
    what is not supported is an error that names all of them (``lora_jax.core.config.peft_fields``).

    Module names are parameter paths without the leaf (see ``lora_jax.core.paths.module_of``).

    Args:
        r: rank of A and B, at least 1.
        lora_alpha: numerator of the scale.
        target_modules: names that match exactly or as a ``.suffix``; or one regular
            expression for the whole module name; or ``"all-linear"``: every matmul weight
            except the output head.
        exclude_modules: names or one regular expression, taken out of the targets.
        lora_dropout: probability of dropping an input of the low-rank path, in [0, 1).
        use_rslora: scale by ``alpha / sqrt(r)`` instead of ``alpha / r`` (arXiv 2312.03732).
        use_dora: also train the norm of each output's weights (arXiv 2402.09353).
        init_lora_weights: a name in ``lora_jax.core.initializers.INITIALIZERS``; ``True`` is PEFT's
            default (B = 0), ``False`` draws both at random, ``"torch"`` draws A with PyTorch's own
            generator. Or one that ``lora_jax.initialise``
            makes: ``"pissa"``, ``"olora"``, ``"eva"``, ….
        rank_pattern: r by module-name pattern; the first hit wins over ``r``.
        alpha_pattern: alpha by module-name pattern; the first hit wins over ``lora_alpha``.
        layers_to_transform: the numbers of the layers that are adapted, where ``target_modules``
            are names; None for all.
        layers_pattern: names of the list that holds the layers, such as ``"layers"``; by default
            the first number in a module's name counts.
        modules_to_save: names of modules trained in full and saved beside the adapters.
        trainable_token_indices: the tokens whose rows are trained as they are (``adapter.Rows``):
            of the input embedding, found by its name; or by the end of a module's name. They
            may stand beside low-rank pairs of other weights, not of the same one.
        ensure_weight_tying: what PEFT needs to hear before an output head that shares the
            embedding's weight changes with it. Here one leaf is one weight, and all its uses
            change. Without it ``modules_to_save`` refuses such a leaf, of which PEFT would train
            a copy for one use, and files warn where PEFT's unmerged model spares the head.
        bias: which biases are trained in full: ``"none"``, ``"all"``, or ``"lora_only"`` (those
            of adapted modules).
        lora_bias: also train a bias beside B: ``s·((x·A)·B + bias)``. Merging adds it to the
            module's own.
        alora_invocation_tokens: the token ids from whose last occurrence on the adapters act
            (aLoRA, arXiv 2504.12397); the adapted function then wants ``active=`` (see
            ``lora_jax.alora_mask``). None for everywhere.
        target_parameters: names of bare parameters, such as the experts of a layer, which match
            exactly or as a ``.suffix``: ``"mlp.experts.gate_up_proj"``. PEFT's patterns mean them
            by these names too; its other fields of modules leave them alone. Those of one module
            come in the order in which it registers them, which PEFT's file rests on; for the
            experts of transformers the order is known.
        on_unsupported: what happens to a target whose use has no rule: ``"error"``, or
            ``"materialize"``, which forms ``W + s·A·B`` there, correct and slow; names or one
            regular expression allow it for these modules alone. Not a field of PEFT's.
        output_slices: for modules whose kernel is several projections side by side, by
            module-name pattern: the ranges of the output axis that are adapted, with a pair
            for each: ``{"c_attn": [(0, 768), (1536, 2304)]}``. Not a field of PEFT's.
        transposed_parameters: those of ``target_parameters`` whose PyTorch modules say
            ``is_transposed``, which exchanges A and B in PEFT's file. Not a field of PEFT's.
        on_unmatched: what happens to names and patterns that mean nothing in the model:
            ``"error"``, or ``"warn"``, as configurations read from files have it, since one of
            them serves several families of models. Two configurations that differ in this alone
            are equal. Not a field of PEFT's.

    Raises:
        ConfigError: lists every field that is out of range.

    Source: PEFT 0.21.2 ``LoraConfig``; LoRA, arXiv 2106.09685.

    >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    >>> config.target_modules
    ('query', 'value')
    """

    r: int = 8
    lora_alpha: int | float = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    lora_bias: bool = False
    alora_invocation_tokens: Sequence[int] | None = None
    on_unsupported: str | Sequence[str] = "error"
    output_slices: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    target_parameters: Sequence[str] | None = None
    transposed_parameters: Sequence[str] | None = None
    on_unmatched: str = field(default="error", compare=False)

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | int):
                object.__setattr__(self, name, tuple(value))
        tokens = token_indices.as_tuples(self.trainable_token_indices)
        object.__setattr__(self, "trainable_token_indices", tokens)
        raise_all(ConfigError, _OUT_OF_RANGE, problems(self))


def scale(config: LoraConfig, r: int, alpha: int | float) -> float:
    """Return ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

    >>> scale(LoraConfig(use_rslora=True), r=16, alpha=8)
    2.0
    """
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def rank_and_alpha(config: LoraConfig, module: str) -> tuple[int, int | float]:
    """Return r and alpha of one module, after ``rank_pattern`` and ``alpha_pattern``."""
    return (
        _first_hit(config.rank_pattern, module, config.r),
        _first_hit(config.alpha_pattern, module, config.lora_alpha),
    )


def materializes(config: LoraConfig, module: str) -> bool:
    """Tell whether ``W + s·A·B`` may be formed where a use of this module has no rule."""
    if config.on_unsupported in ("error", "materialize"):
        return config.on_unsupported == "materialize"
    return matches(config.on_unsupported, module)


def slices(config: LoraConfig, module: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the output axis that are adapted; empty for all of it."""
    return tuple(map(tuple, _first_hit(config.output_slices, module, ())))  # pyright: ignore


def hanging(config: LoraConfig, modules: Iterable[str]) -> list[str]:
    """Return a line for a pattern that comes to no end on these modules (``endless_regexes``)."""
    return endless_regexes.hanging(expressions(config), modules)


def hits(pattern: str, module: str) -> bool:
    """Tell whether a key of ``rank_pattern`` or ``alpha_pattern`` means this module."""
    return re.match(suffixed(pattern), module) is not None


def matches(names: str | Sequence[str] | None, module: str) -> bool:
    r"""Tell whether PEFT would take this module: a regex for all of it, or names by suffix.

    >>> matches(["query"], "layer.0.query"), matches(["query"], "layer.0.subquery")
    (True, False)
    >>> matches(r".*\.(0|1)\..*", "layer.1.query")
    True
    """
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends_with(module, name) for name in names)


def in_chosen_layer(config: LoraConfig, module: str) -> bool:
    """Tell whether ``layers_to_transform`` means the layer that this module is in.

    >>> config = LoraConfig(target_modules=["q"], layers_to_transform=[1])
    >>> in_chosen_layer(config, "layers.1.q"), in_chosen_layer(config, "layers.2.experts.1.q")
    (True, False)
    """
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    lists = config.layers_pattern or r"[^.]*"
    for pattern in (lists,) if isinstance(lists, str) else lists:
        # The first number counts: an expert's comes later. PEFT overlooks it in a list at the
        # top of the model, which trees of parameters may have.
        if found := re.match(in_layers(pattern), module):
            return int(found[found.re.groups]) in ((wanted,) if isinstance(wanted, int) else wanted)
    return False


def parameter_name(config: LoraConfig, path: str) -> str | None:
    """Return the name in ``target_parameters`` that means this path; None where none does.

    >>> config = LoraConfig(target_parameters=["experts.up", "down"])
    >>> parameter_name(config, "0.experts.up"), parameter_name(config, "0.experts.up.bias")
    ('experts.up', None)
    """
    names, path = config.target_parameters or (), path.replace("/", ".")
    return next((name for name in names if _ends_with(path, name)), None)


def is_transposed(config: LoraConfig, path: str) -> bool:
    """Tell whether ``transposed_parameters`` means this path."""
    return matches(config.transposed_parameters, path.replace("/", "."))


def name_in_patterns(config: LoraConfig, path: str) -> str:
    """Return the name by which patterns mean a weight: its module's, or a bare parameter's own."""
    bare = parameter_name(config, path) is not None
    return path.replace("/", ".") if bare else module_of(path)


def is_output_head(module: str) -> bool:
    """Tell whether ``all-linear`` leaves this module out, by the names output heads have."""
    return any(_ends_with(module, name) for name in OUTPUT_HEADS)


def is_saved(config: LoraConfig, module: str) -> bool:
    """Tell whether the module, or one it lies in, is trained in full."""
    parts = module.split(".")
    owners = (".".join(parts[: n + 1]) for n in range(len(parts)))
    return any(matches(config.modules_to_save, owner) for owner in owners)


def tokens_of(config: LoraConfig, module: str) -> list[tuple[int, ...]]:
    """Return the tokens that each entry of ``trainable_token_indices`` gives a module.

    As in PEFT a key means every module whose name ends with it, "." or not.

    >>> config = LoraConfig(trainable_token_indices={"wte": [3, 1]})
    >>> tokens_of(config, "transformer.wte"), tokens_of(config, "transformer.wpe")
    ([(3, 1)], [])
    """
    given = config.trainable_token_indices
    if not isinstance(given, Mapping):
        return []
    return [tuple(tokens) for name, tokens in given.items() if module.endswith(name)]


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _first_hit(patterns: Mapping[str, T], module: str, default: T) -> T:
    return next((value for key, value in patterns.items() if hits(key, module)), default)


def _unknown(others: Mapping[str, Any]) -> list[str]:
    known = [one.name for one in fields(LoraConfig)] + list(FOREIGN)
    return [
        f"{name}: no field of PEFT's; {' or '.join(close) if close else 'leave it out'}"
        for name in others
        if name not in FOREIGN
        for close in (difflib.get_close_matches(name, known, n=2),)
    ]
