"""PEFT's configurations × model families, both ways: ``python -m parity_tests.conformance``.

A cell takes an adapter that PEFT made and drew at random. Read by us it must give PEFT's outputs
and gradients; written by us, PEFT's outputs again; and written twice, the same bytes.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers

from lora_jax import load_config, load_pretrained, lora, plan, save_pretrained
from lora_jax.peft.tensors import encode
from lora_jax.torch import from_torch
from parity_tests.oracle import rel_l2
from parity_tests.test_torch_front import (
    CLASS,
    MODELS,
    Model,
    Wide,
    arrays,
    check,
    outputs,
    outputs_and_gradients,
)
from parity_tests.training import trainable

PAGE = Path(__file__).parent.parent / "docs" / "peft-conformance.md"

RESNET = Model(
    transformers.ResNetForImageClassification,
    transformers.ResNetConfig,
    dict(embedding_size=6, hidden_sizes=[8, 10], depths=[1, 1], layer_type="basic", num_labels=5),
    ("convolution",),
    dict(pixel_values=np.random.default_rng(0).normal(size=(2, 3, 16, 20)).astype(np.float32))
    | CLASS,
)

FAMILIES: Mapping[str, Model] = MODELS | {"resnet": RESNET}


@dataclass(frozen=True)
class Configuration:
    """A configuration of PEFT's for every family.

    Args:
        fields: of ``peft.LoraConfig``, for the family's targets.
        targets: the targets instead of the family's, by family.
        families: those that it makes sense for.
        merged: whether PEFT computes what it should only after merging, as with tied embeddings,
            whose other use it leaves as it was.
        outputs_only: families whose gradients are not compared: torchax gives a row of padding
            a derivative of its own, and PEFT gives one to A alone.
    """

    fields: Callable[[Model], Mapping[str, Any]] = lambda model: {}
    targets: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)
    merged: bool = False
    outputs_only: tuple[str, ...] = ()


def fixed(**fields: Any) -> Callable[[Model], Mapping[str, Any]]:
    return lambda model: fields


def first(model: Model) -> str:
    return model.targets[0]


TRANSFORMERS = tuple(name for name in FAMILIES if name != "resnet")
EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings"}
TIED = {"qwen3": "embed_tokens", "gpt2": "wte"}

CONFIGURATIONS = {
    "defaults": Configuration(),
    "use_rslora": Configuration(fixed(use_rslora=True)),
    "rank_pattern, alpha_pattern": Configuration(
        lambda m: dict(rank_pattern={first(m): 5}, alpha_pattern={rf".*\.{first(m)}": 7})
    ),
    "bias=all": Configuration(fixed(bias="all")),
    "bias=lora_only": Configuration(fixed(bias="lora_only")),
    "modules_to_save": Configuration(
        fixed(modules_to_save=["classifier"]), families=("bert", "vit", "resnet")
    ),
    "use_dora": Configuration(fixed(use_dora=True)),
    "a regular expression": Configuration(
        targets={name: rf".*({'|'.join(model.targets)})" for name, model in FAMILIES.items()}
    ),
    "all-linear": Configuration(
        targets=dict.fromkeys(TRANSFORMERS, "all-linear"), families=TRANSFORMERS
    ),
    "exclude_modules": Configuration(
        lambda m: dict(exclude_modules=rf".*\.1\..*{first(m)}"), families=TRANSFORMERS
    ),
    "layers_to_transform": Configuration(fixed(layers_to_transform=[1]), families=TRANSFORMERS),
    "embeddings": Configuration(
        targets={name: [module, *FAMILIES[name].targets] for name, module in EMBEDDINGS.items()},
        families=tuple(EMBEDDINGS),
        outputs_only=("bert",),
    ),
    "embeddings tied to the head": Configuration(
        targets={name: [module] for name, module in TIED.items()},
        families=tuple(TIED),
        merged=True,
    ),
    "embeddings, use_dora": Configuration(
        fixed(use_dora=True),
        targets={name: [module] for name, module in EMBEDDINGS.items()},
        families=("llama",),
    ),
}

CELLS = [
    (configuration, family)
    for configuration, row in CONFIGURATIONS.items()
    for family in row.families
]


def pefts(configuration: str, family: str) -> Any:
    """Return PEFT's model for a cell, everything that it trains away from where it starts."""
    model, row = FAMILIES[family], CONFIGURATIONS[configuration]
    targets = row.targets.get(family, list(model.targets))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=targets,
        fan_in_fan_out=model.conv1d,
        init_lora_weights=False,
        **row.fields(model),
    )
    torch.manual_seed(5)
    theirs = peft.get_peft_model(model.make(), config).eval()
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return theirs


def check_cell(configuration: str, family: str, directory: Path) -> None:
    """Raise ``AssertionError`` unless the cell holds in both directions."""
    model, row = FAMILIES[family], CONFIGURATIONS[configuration]
    theirs = pefts(configuration, family)
    theirs.save_pretrained(directory / "peft", save_embedding_layers=False)
    fn, params = from_torch(model.make())

    def read(saved: Path) -> tuple[Any, Any]:
        found = plan(fn, params, load_config(saved), **model.batch)
        return found, load_pretrained(saved, found)

    found, adapters = read(directory / "peft")

    def loss(adapters: Any) -> Any:
        out = lora(fn)(params, adapters, **model.batch)
        return out["loss"], out["logits"]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = step(adapters)
    ours = arrays({"loss": value, "logits": logits})
    double = copy.deepcopy(theirs).double()
    if row.merged:
        truth = outputs(double.merge_and_unload(), model.batch, Wide)
        single = outputs(copy.deepcopy(theirs).merge_and_unload(), model.batch)
    else:
        truth = outputs_and_gradients(double, model.batch, Wide)
        single = outputs_and_gradients(theirs, model.batch)
        if family in row.outputs_only:
            truth = {name: truth[name] for name in ours}
        else:
            ours |= arrays(encode(found, gradients))
    assert ours.keys() == truth.keys()
    base = arrays(fn(params, **model.batch))
    assert rel_l2(base["logits"], truth["logits"]) > 1e-3, "vacuous: the adapter does nothing"
    kept = without_zeros(ours, truth)
    check({name: ours[name] for name in kept}, single, truth)

    save_pretrained(directory / "ours", found, adapters)
    again = peft.PeftModel.from_pretrained(model.make(), directory / "ours").eval()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), f"{name} differs in PEFT again"
    save_pretrained(directory / "twice", *read(directory / "ours"))
    for path in (directory / "ours").iterdir():
        assert path.read_bytes() == (directory / "twice" / path.name).read_bytes(), path.name


def without_zeros(ours: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    """Return the tensors that can be compared: not those that are zero but for rounding.

    The gradient of a key's bias is one: softmax does not see what is added to every score.
    """
    sizes = {name: float(np.linalg.norm(value)) for name, value in truth.items()}
    zero = [name for name, size in sizes.items() if size < 1e-12 * max(sizes.values())]
    for name in zero:
        assert np.linalg.norm(ours[name]) < 1e-5 * max(sizes.values()), name
    return [name for name in truth if name not in zero]


HEAD = """# Conformance with PEFT

Written by `python -m parity_tests.conformance`, which runs every cell: transformers' models with
tiny random configurations, read through `from_torch`, against PEFT {version}.

A cell is "yes" if an adapter of PEFT's, drawn at random, gives PEFT's loss, logits and gradients
here; if, written by us, PEFT loads it to the same tensors; and if writing it twice gives the same
bytes. Numbers are held to the rule of `parity_tests/oracle.py` with a float64 run of PEFT as the
truth. Empty cells make no sense for the family. With tied embeddings the truth is PEFT's merged
model: unmerged, PEFT leaves the output head as it was. "outputs" is a cell whose gradients are not
compared: torchax gives a row of padding a derivative of its own, and PEFT gives one to A alone.
"""


def passed(configuration: str, family: str) -> str:
    """Return what the page says of a cell that holds."""
    return "outputs" if family in CONFIGURATIONS[configuration].outputs_only else "yes"


def page(results: Mapping[tuple[str, str], str]) -> str:
    """Return the page as Markdown."""
    lines = [HEAD.format(version=peft.__version__)]
    lines += [
        "| configuration | " + " | ".join(FAMILIES) + " |",
        "|---" * (len(FAMILIES) + 1) + "|",
    ]
    for configuration in CONFIGURATIONS:
        cells = " | ".join(results.get((configuration, family), "") for family in FAMILIES)
        lines.append(f"| {configuration} | {cells} |")
    held = sum(result == passed(*cell) for cell, result in results.items())
    return "\n".join([*lines, "", f"{held} of {len(results)} cells hold.", ""])


def main() -> None:
    """Run every cell, say how it went, and write the page."""
    results = {}
    for n, (configuration, family) in enumerate(CELLS):
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check_cell(configuration, family, Path(scratch))
                results[configuration, family] = passed(configuration, family)
            except Exception as error:
                results[configuration, family] = f"no: {type(error).__name__}"
                print(str(error)[:1500])
        said = results[configuration, family]
        print(f"{n + 1}/{len(CELLS)} {configuration} × {family}: {said}", flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
