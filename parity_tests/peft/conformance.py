"""PEFT's configurations × model families, both ways: ``python -m parity_tests.peft.conformance``.

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

from lora_jax import alora_mask, load_config, load_pretrained, lora, plan, save_pretrained
from lora_jax.parity.suite.torch_models import trainable
from lora_jax.peft.tensors import encode
from lora_jax.torch.from_torch import from_torch
from parity_tests.models import attention_model, moe_models
from parity_tests.models.test_torch_front import (
    CLASS,
    MODELS,
    Model,
    Wide,
    arrays,
    check,
    outputs,
    outputs_and_gradients,
)
from parity_tests.parity.oracle import rel_l2
from parity_tests.peft import init_cells
from parity_tests.peft.formulas import by_formula, dilated

PAGE = Path(__file__).parents[2] / "docs" / "peft-conformance.md"

RESNET = Model(
    transformers.ResNetForImageClassification,
    transformers.ResNetConfig,
    dict(embedding_size=6, hidden_sizes=[8, 10], depths=[1, 1], layer_type="basic", num_labels=5),
    ("convolution",),
    dict(pixel_values=np.random.default_rng(0).normal(size=(2, 3, 16, 20)).astype(np.float32))
    | CLASS,
)

FAMILIES: Mapping[str, Model] = {
    **MODELS,
    "resnet": RESNET,
    "mha": attention_model.MHA,
    **moe_models.MODELS,
}


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
        change: what is done to the family's model at first.
        formula: whether PEFT computes something else, so that the truth is LoRA's formula.
        untied: whether PEFT's truth is that without ``ensure_weight_tying``, merged: with it
            PEFT's tied pair can neither be copied nor merged, and its outputs alone compare.
    """

    fields: Callable[[Model], Mapping[str, Any]] = lambda model: {}
    targets: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)
    merged: bool = False
    outputs_only: tuple[str, ...] = ()
    change: Callable[[Any], Any] = lambda module: module
    formula: bool = False
    untied: bool = False


def fixed(**fields: Any) -> Callable[[Model], Mapping[str, Any]]:
    return lambda model: fields


def first(model: Model) -> str:
    return model.targets[0]


def pattern(model: Model) -> str:
    return next((LISTS[name] for name in LISTS if FAMILIES[name] is model), "stages")


TRANSFORMERS = tuple(name for name in FAMILIES if name != "resnet")
TOKENS = (7, 3, 11)
# PEFT refuses DoRA in an nn.MultiheadAttention, and all-linear gives it a pair without effect.
NO_ATTENTION = tuple(name for name in FAMILIES if name != "mha")
# The router of Llama 4 is a Linear that returns a pair, which PEFT's wrapper does not expect.
ALL_LINEAR = tuple(name for name in TRANSFORMERS if name not in ("llama4", "mha"))
STACKED = ("gpt_oss", "llama4")
EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings"}
TIED = {"qwen3": "embed_tokens", "gpt2": "wte"}
LISTS = {"llama": "layers", "qwen3": "layers", "bert": "layer", "gpt2": "h", "vit": "layer"}
PLAIN = ("llama", "qwen3", "bert", "gpt2", "vit", "resnet")

CONFIGURATIONS = {
    "defaults": Configuration(),
    "use_rslora": Configuration(fixed(use_rslora=True)),
    "rank_pattern, alpha_pattern": Configuration(
        lambda m: dict(rank_pattern={first(m): 5}, alpha_pattern={rf".*\.{first(m)}": 7})
    ),
    "bias=all": Configuration(fixed(bias="all")),
    "bias=lora_only": Configuration(fixed(bias="lora_only")),
    "modules_to_save": Configuration(
        fixed(modules_to_save=["classifier"]), families=("bert", "vit", "resnet", "mha")
    ),
    "use_dora": Configuration(fixed(use_dora=True), families=NO_ATTENTION),
    "alora_invocation_tokens": Configuration(
        # In the first example, not in the second.
        lambda m: dict(
            alora_invocation_tokens=m.batch["input_ids"][0, 2:4].tolist(), task_type="CAUSAL_LM"
        ),
        families=("llama", "qwen3", "gpt2"),
    ),
    "a regular expression": Configuration(
        targets={name: rf".*({'|'.join(model.targets)})" for name, model in FAMILIES.items()}
    ),
    "all-linear": Configuration(
        targets=dict.fromkeys(ALL_LINEAR, "all-linear"), families=ALL_LINEAR
    ),
    "exclude_modules": Configuration(
        lambda m: dict(exclude_modules=rf".*\.1\..*{first(m)}"), families=TRANSFORMERS
    ),
    "layers_to_transform": Configuration(fixed(layers_to_transform=[1]), families=TRANSFORMERS),
    "target_parameters": Configuration(
        lambda m: dict(target_parameters=list(m.parameters)),
        targets=dict.fromkeys(STACKED, ()),
        families=STACKED,
    ),
    "target_parameters, target_modules, patterns": Configuration(
        lambda m: dict(
            target_parameters=list(m.parameters),
            rank_pattern={m.parameters[0]: 5, first(m): 2},
            alpha_pattern={rf".*1\..*\.{m.parameters[1]}": 7},
            use_rslora=True,
        ),
        families=STACKED,
    ),
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
    "trainable_token_indices": Configuration(
        fixed(trainable_token_indices=list(TOKENS)), families=("llama", "qwen3", "bert", "gpt2")
    ),
    "trainable_token_indices by name": Configuration(
        fixed(trainable_token_indices={"embed_tokens": [9, 7], "lm_head": [3, 1, 8]}),
        families=("llama",),
    ),
    "trainable_token_indices, ensure_weight_tying": Configuration(
        fixed(trainable_token_indices=list(TOKENS), ensure_weight_tying=True),
        families=("qwen3", "gpt2"),
    ),
    "modules_to_save of embeddings": Configuration(
        fixed(modules_to_save=["embed_tokens"]),
        families=("llama",),
    ),
    "modules_to_save, ensure_weight_tying": Configuration(
        fixed(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        targets={"qwen3": ["o_proj", "down_proj"]},
        families=("qwen3",),
    ),
    "embeddings, ensure_weight_tying": Configuration(
        fixed(ensure_weight_tying=True),
        targets={"qwen3": ["embed_tokens", "q_proj"]},
        families=("qwen3",),
        untied=True,
    ),
    "embeddings, use_dora": Configuration(
        fixed(use_dora=True),
        targets={name: [module] for name, module in EMBEDDINGS.items()},
        families=("llama",),
    ),
    "lora_bias": Configuration(fixed(lora_bias=True), families=PLAIN),
    "lora_bias, bias=all, use_rslora": Configuration(
        fixed(lora_bias=True, bias="all", use_rslora=True), families=("bert", "gpt2", "vit")
    ),
    "lora_dropout": Configuration(fixed(lora_dropout=0.3), families=PLAIN),
    "layers_pattern": Configuration(
        lambda m: dict(layers_to_transform=[1], layers_pattern=pattern(m)),
        families=(*LISTS, "resnet"),
    ),
    "fan_in_fan_out": Configuration(fixed(fan_in_fan_out=True), families=("gpt2",)),
    "init_lora_weights=true": Configuration(fixed(init_lora_weights=True), families=PLAIN),
    "init_lora_weights=false": Configuration(fixed(init_lora_weights=False), families=PLAIN),
    "init_lora_weights=gaussian": Configuration(
        fixed(init_lora_weights="gaussian"), families=PLAIN
    ),
    "dilation and padding_mode of a convolution": Configuration(
        families=("resnet",), change=dilated, formula=True
    ),
}

CELLS = [
    (configuration, family)
    for configuration, row in CONFIGURATIONS.items()
    for family in row.families
]


def base(configuration: str, family: str) -> Any:
    """Return PyTorch's model for a cell, without adapters."""
    return CONFIGURATIONS[configuration].change(FAMILIES[family].make())


def fresh(configuration: str, family: str, **others: Any) -> Any:
    """Return PEFT's model for a cell, as it starts."""
    model, row = FAMILIES[family], CONFIGURATIONS[configuration]
    targets = row.targets.get(family, model.targets)
    named = targets if isinstance(targets, str) else list(targets)
    fields = dict(r=3, lora_alpha=4, fan_in_fan_out=model.conv1d, init_lora_weights=False)
    config = peft.LoraConfig(target_modules=named, **(fields | dict(row.fields(model)) | others))
    torch.manual_seed(5)
    return peft.get_peft_model(base(configuration, family), config).eval()


def moved(theirs: Any) -> Any:
    """Return PEFT's model after everything that it trains has moved from where it started."""
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            zero = not parameter.any()
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            parameter.add_(0.1 * zero * torch.randn_like(parameter))
    return theirs


def pefts(configuration: str, family: str) -> Any:
    """Return PEFT's model for a cell, everything that it trains away from where it starts."""
    return moved(fresh(configuration, family))


def check_cell(configuration: str, family: str, directory: Path) -> None:
    """Raise ``AssertionError`` unless the cell holds in both directions."""
    model, row = FAMILIES[family], CONFIGURATIONS[configuration]
    theirs = pefts(configuration, family)
    theirs.save_pretrained(directory / "peft", save_embedding_layers=False)
    # PEFT's attention merges and takes away again at every call, which rounds the base's weights.
    loaded = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    fn, params = from_torch(model.readable(base(configuration, family)))

    def read(saved: Path) -> tuple[Any, Any]:
        found = plan(fn, params, load_config(saved), **model.batch)
        return found, load_pretrained(saved, found)

    found, adapters = read(directory / "peft")

    tokens = found.config.alora_invocation_tokens
    options = {"active": alora_mask(model.batch["input_ids"], tokens)} if tokens else {}

    def loss(adapters: Any) -> Any:
        out = lora(fn)(params, adapters, **model.batch, **options)
        return out["loss"], out["logits"]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = step(adapters)
    ours = arrays({"loss": value, "logits": logits})
    if row.formula:
        told = (base(configuration, family), directory / "peft", 4 / 3, model.batch)
        single, truth = by_formula(*told), by_formula(*told, Wide, torch.float64)
    elif row.untied:
        untied = fresh(configuration, family, ensure_weight_tying=False)
        untied.load_state_dict(theirs.state_dict(), strict=False)
        truth = outputs(untied.double().merge_and_unload(), model.batch, Wide)
        single = outputs(theirs, model.batch)
    elif row.merged:
        double = copy.deepcopy(theirs).double()
        truth = outputs(double.merge_and_unload(), model.batch, Wide)
        single = outputs(copy.deepcopy(theirs).merge_and_unload(), model.batch)
    else:
        truth = outputs_and_gradients(copy.deepcopy(theirs).double(), model.batch, Wide)
        single = outputs_and_gradients(theirs, model.batch)
    if family in row.outputs_only:
        truth = {name: truth[name] for name in ours}
    elif not (row.merged or row.untied):
        ours |= attention_model.once(arrays(encode(found, gradients)))
    assert ours.keys() == truth.keys()
    plain = arrays(fn(params, **model.batch))
    assert rel_l2(plain["logits"], truth["logits"]) > 1e-3, "vacuous: the adapter does nothing"
    kept = without_zeros(ours, truth)
    check({name: ours[name] for name in kept}, single, truth)

    save_pretrained(directory / "ours", found, adapters)
    again = peft.PeftModel.from_pretrained(base(configuration, family), directory / "ours").eval()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, loaded[name]), f"{name} differs in PEFT again"
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

Written by `python -m parity_tests.peft.conformance`, which runs every cell: transformers' models
with tiny random configurations, read through `from_torch`, against PEFT {version}.

A cell is "yes" if an adapter of PEFT's, drawn at random, gives PEFT's loss, logits and gradients
here; if, written by us, PEFT loads it to the same tensors; and if writing it twice gives the same
bytes. Numbers are held to the rule of `parity_tests/parity/oracle.py` with a float64 run of PEFT as
the truth. Empty cells make no sense for the family. With tied embeddings the truth is PEFT's merged
model: unmerged, PEFT leaves the output head as it was. With `ensure_weight_tying` and a pair it is
that without the field, since PEFT merges such a pair twice. "outputs" is a cell whose gradients are
not compared: torchax gives a row of padding a derivative of its own, and PEFT gives one to A alone.
"formula" is one in which PEFT is wrong, so that the truth is its base model with `W + s·B·A` in the
place of every adapted weight: it hands a convolution's `dilation` and `padding_mode` on to no A.
Every adapter is away from where it starts. "mha" has `nn.MultiheadAttention`: PEFT adds the change
of its `out_proj` twice, merged or not, and differentiates one of the two. Its files are read as
PEFT computes them, and its gradients are compared with that one's.
"""


def passed(configuration: str, family: str) -> str:
    """Return what the page says of a cell that holds."""
    if configuration in init_cells.INITIALISATIONS:
        return init_cells.passed(configuration, family)
    row = CONFIGURATIONS[configuration]
    return "outputs" if family in row.outputs_only else "formula" if row.formula else "yes"


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
    lines += ["", *init_cells.section(results)]
    held = sum(result == passed(*cell) for cell, result in results.items())
    return "\n".join([*lines, "", f"{held} of {len(results)} cells hold.", ""])


def main() -> None:
    """Run every cell, say how it went, and write the page."""
    results, both = {}, [*CELLS, *init_cells.CELLS]
    for n, (configuration, family) in enumerate(both):
        run = init_cells.check_cell if n >= len(CELLS) else check_cell
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run(configuration, family, Path(scratch))
                results[configuration, family] = passed(configuration, family)
            except Exception as error:
                results[configuration, family] = f"no: {type(error).__name__}"
                print(str(error)[:1500])
        said = results[configuration, family]
        print(f"{n + 1}/{len(both)} {configuration} × {family}: {said}", flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
