"""PEFT's initialisations × model families, both ways: a table, and what a cell has to hold.

Ours to PEFT: what ``initialise`` made, moved away from there, saved, and loaded by PEFT on the
original weights gives our logits. PEFT to ours: what PEFT initialised, moved and saved, gives
PEFT's logits here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

from lora_jax import (
    LoraConfig,
    eva_ranks,
    for_changed_base,
    initialise,
    load_config,
    load_pretrained,
    lora,
    merge,
    plan,
    relative_to,
    save_pretrained,
    scale_by,
)
from lora_jax.core.errors import AdapterError
from lora_jax.core.initializers import changes_base
from lora_jax.torch.from_torch import from_torch
from parity_tests.models.test_torch_front import MODELS, Model, Wide, arrays, check, outputs
from parity_tests.parity.oracle import rel_l2

FAMILIES = ("llama", "gpt2", "bert")
RANK, ALPHA = 4, 6

# What PEFT's side of a cell does: its model with the initialisation, from the family.
Run = Callable[[Model, peft.LoraConfig], Any]


@dataclass(frozen=True)
class Init:
    """An initialisation of PEFT's.

    Args:
        name: ``init_lora_weights``.
        reads: what ours is given: ``"data"``, ``"gradient"`` or nothing.
        run: makes PEFT's model.
        theirs: fields of ``peft.LoraConfig``.
        ours: options of ``initialise``.
        formula: why the file that PEFT saves without converting it is compared with
            ``W - s·A₀·B₀ + s·A·B``, and not with PEFT.
        one_way: the families that PEFT cannot make it for on a CPU, and why.
    """

    name: bool | str
    reads: str = ""
    run: Run = lambda model, config: peft.get_peft_model(model.make(), config)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    formula: str = ""
    one_way: Mapping[str, str] = field(default_factory=dict)


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in model.batch.items()}


def run_eva(model: Model, config: peft.LoraConfig) -> Any:
    theirs = peft.get_peft_model(model.make(), config, low_cpu_mem_usage=True)
    batch = {k: v for k, v in tensors(model).items() if k != "labels"}
    initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    return theirs


def run_corda(model: Model, config: peft.LoraConfig) -> Any:
    from peft.tuners.lora.corda import preprocess_corda

    module, batch = model.make(), tensors(model)
    # PEFT's hook wants one sentence at a time, without padding
    rows = [ids[mask.bool()][None] for ids, mask in zip(*_text(batch), strict=True)]
    preprocess_corda(module, config, run_model=lambda: [module(input_ids=row) for row in rows])
    return peft.get_peft_model(module, config)


def run_lora_ga(model: Model, config: peft.LoraConfig) -> Any:
    module = model.make()
    preprocess_loraga(module, config, lambda: module(**tensors(model)).loss.backward())
    return peft.get_peft_model(module, config)


def _text(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    return batch["input_ids"], batch["attention_mask"]


_RELOADED = "PEFT does not take s·A₀·B₀ out of the base again when it loads"
_NO_GPU = dict.fromkeys(FAMILIES, "PEFT quantises on a GPU, with bitsandbytes")
_TURNED = "PEFT takes Conv1D's (in, out) for (out, in), so its A and B do not fit"

INITIALISATIONS: Mapping[str, Init] = {
    "true": Init(True),
    "false": Init(False),
    "gaussian": Init("gaussian"),
    "orthogonal": Init("orthogonal"),
    "olora": Init("olora", one_way=dict(gpt2=_TURNED)),
    "pissa": Init("pissa"),
    "pissa_niter_4": Init("pissa_niter_4"),
    "mica": Init("mica"),
    "eva": Init("eva", "data", run_eva, dict(eva_config=EvaConfig(rho=2.0))),
    "corda": Init("corda", "data", run_corda, dict(corda_config=CordaConfig(corda_method="ipm"))),
    "lora_ga": Init(
        "lora_ga",
        "gradient",
        run_lora_ga,
        dict(lora_ga_config=LoraGAConfig()),
        formula=_RELOADED,
    ),
    "loftq, 4 bits": Init("loftq", ours=dict(bits=4, iterations=2), one_way=_NO_GPU),
    "loftq, 8 bits": Init("loftq", ours=dict(bits=8), one_way=_NO_GPU),
}

CELLS = [(init, family) for init in INITIALISATIONS for family in FAMILIES]


def passed(init: str, family: str) -> str:
    """Return what the page says of a cell that holds."""
    return "to PEFT" if family in INITIALISATIONS[init].one_way else "yes"


SECTION = """## Initialisations

Ours, moved away from its start and saved as plain LoRA, gives our logits in PEFT on the original
weights; what PEFT initialised, moved and saved, gives PEFT's logits here. Where an initialisation
changes the base the file has twice the rank: ours by `relative_to`, PEFT's by
`path_initial_model_for_weight_conversion`. Not so LoftQ's, which is for its quantised base, loaded
in PEFT with it. "to PEFT" is a cell that PEFT cannot make: LoftQ wants a GPU there, and OLoRA takes
GPT-2's (in, out) weights for (out, in). Without conversion PEFT loads its own `lora_ga` file to
another model: there, ours is compared with `W - s·A₀·B₀ + s·A·B`. EVA's ranks are redistributed
(`rho=2`), and its padding is masked, as CorDA's.
"""


def section(results: Mapping[tuple[str, str], str]) -> list[str]:
    """Return the lines of the page that say how these cells went."""
    rows = [
        f"| {init} | " + " | ".join(results.get((init, f), "") for f in FAMILIES) + " |"
        for init in INITIALISATIONS
    ]
    head = "| init_lora_weights | " + " | ".join(FAMILIES) + " |"
    return [SECTION, head, "|---" * (len(FAMILIES) + 1) + "|", *rows]


@dataclass(frozen=True)
class Ours:
    """A family's model as a function of its parameters."""

    model: Model
    fn: Callable[..., Any]
    params: Any

    @classmethod
    def of(cls, family: str) -> Ours:
        model = MODELS[family]
        return cls(model, *from_torch(model.make()))

    def outputs(self, base: Any, adapters: Any) -> dict[str, np.ndarray]:
        return _logits(arrays(self._jitted(base, adapters)))

    @cached_property
    def _jitted(self) -> Callable[..., Any]:
        return jax.jit(lambda base, adapters: lora(self.fn)(base, adapters, **self.model.batch))

    def plan(self, config: LoraConfig) -> Any:
        return plan(self.fn, self.params, config, **self.model.batch)

    def data(self, reads: str) -> dict[str, Any]:
        """Return what ``initialise`` is given: sentences one by one, or the loss of all."""
        ids, mask = _text(self.model.batch)
        if reads == "gradient":
            labels = self.model.batch["labels"]
            return dict(
                fn=lambda params, ids, mask, labels: self.fn(
                    params, input_ids=ids, attention_mask=mask, labels=labels
                )["loss"],
                batches=[(ids, mask, labels)],
            )
        if reads == "data":
            return dict(
                fn=lambda params, ids, mask: self.fn(params, input_ids=ids, attention_mask=mask)[
                    "logits"
                ],
                batches=[(i[None], m[None]) for i, m in zip(ids, mask, strict=True)],
                mask=lambda ids, mask: mask,
            )
        return {}


def check_cell(init: str, family: str, directory: Path) -> None:
    """Raise ``AssertionError`` unless the cell holds in both directions."""
    ours = Ours.of(family)
    check_ours_in_peft(INITIALISATIONS[init], ours, directory)
    if family not in INITIALISATIONS[init].one_way:
        check_pefts_here(INITIALISATIONS[init], ours, directory)


def check_ours_in_peft(init: Init, ours: Ours, directory: Path) -> None:
    """PEFT, on the original weights, gives the logits of what was made here and trained."""
    model = ours.model
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=model.targets, init_lora_weights=init.name
    )
    found, data = ours.plan(config), ours.data(init.reads)
    if init.name == "eva":
        found = eva_ranks(found, ours.params, **data)
    base, start = initialise(found, ours.params, jax.random.key(3), **data, **init.ours)
    moved = _moved(start)
    module = model.make()
    if init.name == "loftq":
        module.load_state_dict(
            {k: torch.from_numpy(np.array(v)) for k, v in base.items()}, strict=False
        )
        saved, plain = for_changed_base(found), moved
    elif changes_base(init.name):
        saved, plain = relative_to(found, start, moved)
    else:
        saved, plain = found, moved
    save_pretrained(directory / "ours", saved, plain)
    theirs = peft.PeftModel.from_pretrained(module, directory / "ours").eval()
    mine = ours.outputs(base, moved)
    _compare(mine, theirs, model)
    fresh = _logits(arrays(ours.fn(ours.params, **model.batch)))
    assert rel_l2(mine["logits"], np.float64(fresh["logits"])) > 1e-2, "vacuous: nothing moved"
    if init.name not in (False, "loftq"):  # at its start the model is what it was
        begun = ours.outputs(base, start)["logits"]
        assert rel_l2(begun, np.float64(fresh["logits"])) < 2e-5, "the start is another model"


def check_pefts_here(init: Init, ours: Ours, directory: Path) -> None:
    """What PEFT made, trained and saved for the original weights gives PEFT's logits here."""
    model = ours.model
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(model.targets),
        fan_in_fan_out=model.conv1d,
        init_lora_weights=init.name,
        **init.theirs,
    )
    torch.manual_seed(5)
    theirs = init.run(model, config).eval()
    converts: dict[str, Any] = {}
    if changes_base(init.name):
        theirs.save_pretrained(directory / "start")
        converts = dict(path_initial_model_for_weight_conversion=str(directory / "start"))
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = copy.deepcopy(theirs)
    theirs.save_pretrained(directory / "peft", **converts)
    found = ours.plan(load_config(directory / "peft"))
    mine = ours.outputs(ours.params, load_pretrained(directory / "peft", found))
    _compare(mine, trained, model)
    if init.formula:
        check_without_conversion(ours, trained, directory)


def check_without_conversion(ours: Ours, trained: Any, directory: Path) -> None:
    """The file that PEFT saves by default is right beside ``W - s·A₀·B₀``, where PEFT is not."""
    trained.save_pretrained(directory / "default")
    with_init = ours.plan(load_config(directory / "default"))
    with pytest.raises(AdapterError, match="for_changed_base"):
        load_pretrained(directory / "default", with_init)
    found = for_changed_base(with_init)
    start = load_pretrained(directory / "start", ours.plan(load_config(directory / "start")))
    base = merge(ours.params, scale_by(start, -1.0))
    mine = ours.outputs(base, load_pretrained(directory / "default", found))
    _compare(mine, trained, ours.model)
    again = peft.PeftModel.from_pretrained(ours.model.make(), directory / "default").eval()
    theirs = outputs(again, ours.model.batch)["logits"]
    assert rel_l2(theirs, np.float64(mine["logits"])) > 1e-3, "PEFT has mended its defect"


def _moved(adapters: Any) -> Any:
    """Return adapters as training leaves them: every A and B away from its start."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), adapters
    )


def _compare(mine: Mapping[str, Any], theirs: Any, model: Model) -> None:
    """Hold our loss and logits to the rule, with PEFT's in float64 as the truth."""
    truth = outputs(copy.deepcopy(theirs).double(), model.batch, Wide)
    check(mine, outputs(theirs, model.batch), truth)


def _logits(out: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: out[name] for name in ("loss", "logits")}
