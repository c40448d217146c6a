"""Targets as the public writes them: PEFT's own choice of modules, ranks and scales, and hints."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import peft
import pytest
from torch import nn as torch_nn
from transformers import PretrainedConfig, PreTrainedModel

import lora_jax.linen
from lora_jax import LoraConfig, lora, merge, plan
from lora_jax.core.errors import PlanError

SIZE, LAYERS, HEAD = 4, 3, 5

# The modules of a family in the order of the call: one for each layer, before and behind them.
FAMILIES = {
    "llama": (
        ["model.embed_tokens"],
        [
            "model.layers.{}.input_layernorm",
            *(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"),
            "model.layers.{}.post_attention_layernorm",
            *(f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
        ],
        ["model.norm", "lm_head"],
    ),
    "bert": (
        ["bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm"],
        [
            *(f"bert.encoder.layer.{{}}.attention.self.{n}" for n in ("query", "key", "value")),
            "bert.encoder.layer.{}.attention.output.dense",
            "bert.encoder.layer.{}.attention.output.LayerNorm",
            "bert.encoder.layer.{}.intermediate.dense",
            "bert.encoder.layer.{}.output.dense",
            "bert.encoder.layer.{}.output.LayerNorm",
        ],
        ["bert.pooler.dense", "classifier"],
    ),
    "gpt2": (
        ["transformer.wte"],
        [
            "transformer.h.{}.ln_1",
            "transformer.h.{}.attn.c_attn",
            "transformer.h.{}.attn.c_proj",
            "transformer.h.{}.ln_2",
            "transformer.h.{}.mlp.c_fc",
            "transformer.h.{}.mlp.c_proj",
        ],
        ["transformer.ln_f", "lm_head"],
    ),
    "mixtral": (
        ["model.embed_tokens"],
        [
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.block_sparse_moe.gate",
            *(f"model.layers.{{}}.block_sparse_moe.experts.{e}.w{n}" for e in "01" for n in "13"),
        ],
        ["model.norm", "lm_head"],
    ),
    "vision and text": (
        ["language_model.model.embed_tokens"],
        [
            *(f"vision_tower.encoder.layers.{{}}.self_attn.{name}_proj" for name in "qv"),
            *(f"language_model.model.layers.{{}}.self_attn.{name}_proj" for name in "qv"),
            "language_model.model.layers.{}.mlp.down_proj",
        ],
        ["multi_modal_projector.linear_1", "language_model.lm_head"],
    ),
}
HEADS = ("lm_head", "classifier")
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")


def modules_of(family):
    before, layer, behind = FAMILIES[family]
    return [*before, *(name.format(n) for n in range(LAYERS) for name in layer), *behind]


def kind(module):
    last = module.rpartition(".")[2]
    if last in EMBEDDINGS:
        return "embedding"
    return "norm" if "norm" in last.lower() or last.startswith("ln_") else "linear"


class Torch(PreTrainedModel):
    """The modules of a family, by name; PEFT asks for no call."""

    config_class = PretrainedConfig

    def __init__(self, family):
        super().__init__(PretrainedConfig())
        for module in modules_of(family):
            own = {
                "embedding": lambda: torch_nn.Embedding(7, SIZE),
                "norm": lambda: torch_nn.LayerNorm(SIZE),
                "linear": lambda: torch_nn.Linear(SIZE, out_size(module)),  # noqa: B023
            }[kind(module)]()
            *parents, last = module.split(".")
            owner = self
            for name in parents:
                if not hasattr(owner, name):
                    owner.add_module(name, torch_nn.Module())
                owner = getattr(owner, name)
            owner.add_module(last, own)

    def get_output_embeddings(self):
        # PEFT finds the head through the class; here it has its name.
        heads = [m for name, m in self.named_modules() if name.rpartition(".")[2] in HEADS]
        return heads[0] if heads else None


def out_size(module):
    return HEAD if module.rpartition(".")[2] in HEADS else SIZE


def jax_model(family):
    """Return the same modules as a function of JAX, and its parameters."""
    params = {}
    for module in modules_of(family):
        shapes = {
            "embedding": {"weight": (7, SIZE)},
            "norm": {"weight": (SIZE,), "bias": (SIZE,)},
            "linear": {"weight": (out_size(module), SIZE), "bias": (out_size(module),)},
        }[kind(module)]
        params |= {f"{module}.{leaf}": jnp.ones(shape) for leaf, shape in shapes.items()}

    def fn(params, ids):
        x = ids
        for module in modules_of(family):
            weight = params[f"{module}.weight"]
            if kind(module) == "embedding":
                x = weight[x]
            elif kind(module) == "norm":
                x = x * weight + params[f"{module}.bias"]
            else:
                x = jnp.tanh(x @ weight.T + params[f"{module}.bias"])
        return x

    return fn, params


# As they stand in files and notebooks: lists for several families, expressions, exclusions, layers.
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PUBLIC = [
    dict(target_modules=["q_proj", "v_proj"]),
    dict(target_modules=SEVEN),
    dict(target_modules=[*SEVEN, "lm_head"]),
    dict(target_modules=[*SEVEN, "embed_tokens", "lm_head"]),
    dict(target_modules=["query", "value"]),
    dict(target_modules=["query", "key", "value", "dense"]),
    dict(target_modules=["c_attn"]),
    dict(target_modules=["c_attn", "c_proj", "c_fc"]),
    dict(target_modules=["attn.c_proj"]),
    dict(target_modules=["q_proj", "v_proj", "query", "value", "c_attn", "query_key_value"]),
    dict(target_modules=["q", "v", "q_proj", "query"]),
    dict(target_modules=["w1", "w2", "w3", "gate"]),
    dict(target_modules=["proj"]),
    dict(target_modules=["attention.output.dense", "classifier"]),
    dict(target_modules=["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]),
    dict(target_modules=["model.layers.1.mlp.down_proj", "bert.pooler.dense"]),
    dict(target_modules="all-linear"),
    dict(target_modules="all-linear", exclude_modules=["q_proj", "query", "c_attn"]),
    dict(target_modules="all-linear", exclude_modules=r".*vision_tower.*"),
    dict(target_modules="all-linear", modules_to_save=["lm_head", "classifier"]),
    dict(target_modules=r".*\.(q|v)_proj"),
    dict(target_modules=r".*self_attn\.[qkvo]_proj"),
    dict(target_modules=r"^(?!.*vision).*(q_proj|v_proj|down_proj)$"),
    dict(target_modules=r"model\.layers\.(0|2)\..*_proj"),
    dict(target_modules=r".*layer\.[12]\.attention\.self\.(query|value)"),
    dict(target_modules=r".*(c_attn|c_fc)$"),
    dict(target_modules=r".*language_model.*\.(up_proj|down_proj|q_proj|v_proj)"),
    dict(target_modules=r".*experts\.\d+\.w[13]"),
    dict(target_modules=r"q_proj"),
    dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]),
    dict(target_modules=["q_proj", "v_proj"], layers_to_transform=1),
    dict(target_modules=SEVEN, layers_to_transform=[1, 2], layers_pattern="layers"),
    dict(target_modules=["query", "c_attn", "w1"], layers_to_transform=[0], layers_pattern="h"),
    dict(target_modules=["query"], layers_to_transform=[2], layers_pattern=["layers", "layer"]),
    dict(target_modules=["w1"], layers_to_transform=[1]),
    dict(target_modules=["w1", "gate"], layers_to_transform=[1], layers_pattern=["experts"]),
    dict(target_modules=SEVEN, exclude_modules=["down_proj", "0.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*"),
    dict(target_modules=["query", "value"], modules_to_save=["classifier", "score"]),
    dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    dict(target_modules=["dense", "classifier"], modules_to_save=["classifier"]),
    dict(target_modules=SEVEN, rank_pattern={"q_proj": 4, "layers.0.mlp.down_proj": 2}),
    dict(target_modules=SEVEN, rank_pattern={r".*self_attn.*": 3, "q_proj": 5}),
    dict(target_modules=SEVEN, alpha_pattern={r"layers\.\d+\.mlp\..*": 32, "v_proj": 1}),
    dict(target_modules=["query", "value"], rank_pattern={"^bert.encoder.layer.0.*": 5}),
    dict(target_modules=["c_attn"], use_rslora=True, rank_pattern={"h.1.attn.c_attn": 16}),
    dict(target_modules="all-linear", rank_pattern={"lm_head": 3}, alpha_pattern={"dense": 2}),
]


def pefts(family, fields):
    """Return PEFT's rank and scale by module, and what it saves; None where it adapts nothing."""
    model = Torch(family)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields))
    except ValueError:
        return None
    found, saved = {}, set()
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[name] = (module.r["default"], module.scaling["default"])
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            saved.add(name)
    return found, saved


def ours(family, fields):
    fn, params = jax_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**fields, on_unmatched="warn")
        try:
            found = plan(fn, params, config, jnp.zeros((2, 3), jnp.int32))
        except PlanError as error:
            assert "match no module" in str(error), str(error)
            return None
    adapted = {leaf.module: (leaf.r, leaf.scale) for leaf in found.adapted}
    return adapted, {path.rpartition(".")[0] for path in found.full}


@pytest.mark.parametrize("family", FAMILIES)
def test_public_configurations_adapt_what_peft_adapts(family):
    different, adapting = [], 0
    for fields in PUBLIC:
        theirs, mine = pefts(family, fields), ours(family, fields)
        if theirs != mine:
            different.append((fields, theirs, mine))
        adapting += theirs is not None
    assert different == []
    assert adapting >= 8, "most of the configurations say nothing of this family"


# --- what is no matrix, and arrays in boxes ---------------------------------------------------

X = jnp.linspace(-1.0, 1.0, 80).reshape(2, 5, 8)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="attn_norm")(x)
        return nn.MultiHeadDotProductAttention(2, name="attn")(x)


def stacked(params, x):
    def body(h, p):
        h = h * p["norm"]["scale"] + p["norm"]["bias"] + p["table"]
        return jnp.tanh(h @ p["proj"]["kernel"] + p["proj"]["bias"]), None

    return jax.lax.scan(body, x, params["layers"])[0]


LAYERS_OF = {
    "norm": {"scale": jnp.ones((3, 8)), "bias": jnp.ones((3, 8))},
    "proj": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))},
    "table": jnp.ones((3, 5, 8)),
}


def adapted(fn, params, targets, x=X):
    config = LoraConfig(r=2, target_modules=targets)
    return [leaf.path for leaf in plan(fn, params, config, x).adapted]


def test_an_expression_leaves_out_what_is_no_matrix():
    fn = lora_jax.linen.wrap(Attention())
    params = Attention().init(jax.random.key(0), X)["params"]
    kernels = [f"attn.{name}.kernel" for name in ("key", "out", "query", "value")]
    for targets in (r".*attn.*", r"attn\.\w+", r".*", "all-linear"):
        assert sorted(adapted(fn, params, targets)) == kernels, targets
    assert adapted(fn, params, r"attn\.(query|value)\.kernel") == [kernels[2], kernels[3]]
    # One that names nothing else is an error, and so is a name of its own.
    for targets in (r".*bias", ["attn.query.bias"]):
        with pytest.raises(PlanError, match=r"attn\.query\.bias: add of shape"):
            adapted(fn, params, targets)
    for targets in (r"layers.*", r".*(norm|proj).*", ["proj"], r".*"):
        assert adapted(stacked, {"layers": LAYERS_OF}, targets) == ["layers.proj.kernel"], targets
    for targets in (["norm", "proj"], [r"table"], r".*norm.*"):
        with pytest.raises(PlanError, match="no rule"):
            adapted(stacked, {"layers": LAYERS_OF}, targets)


def test_an_expression_that_names_a_weight_without_a_rule_is_still_an_error():
    def fn(params, x):
        return x @ params["odd"]["kernel"] @ jnp.sort(params["sorted"]["kernel"], 0)

    params = {name: {"kernel": jnp.ones((8, 8))} for name in ("odd", "sorted", "unused")}
    with pytest.raises(PlanError, match="sorted.kernel: sort"):
        adapted(fn, params, r"odd|sorted")
    with pytest.raises(PlanError, match="unused.kernel: the function never uses it"):
        adapted(fn, params, r"odd|unused")


BOXED = {
    "a name with its axes": (
        {"c_attn": {"weight_MxN": jnp.ones((8, 6)), "bias_N": jnp.ones(6)}},
        lambda p, x: x @ p["c_attn"]["weight_MxN"] + p["c_attn"]["bias_N"],
        "c_attn.weight_MxN",
    ),
    "Penzai": (
        {"c_attn": {"weights": {"value": {"data_array": jnp.ones((8, 6))}}}},
        lambda p, x: x @ p["c_attn"]["weights"]["value"]["data_array"],
        "c_attn.weights.value.data_array",
    ),
    "haliax": (
        {"c_attn": {"weight": {"array": jnp.ones((8, 6))}, "bias": {"array": jnp.ones(6)}}},
        lambda p, x: x @ p["c_attn"]["weight"]["array"] + p["c_attn"]["bias"]["array"],
        "c_attn.weight.array",
    ),
}


@pytest.mark.parametrize("name", BOXED)
def test_a_module_is_meant_by_its_name_whatever_holds_its_array(name):
    params, fn, path = BOXED[name]
    params = {"blocks": {"attn": params}}
    path = f"blocks.attn.{path}"

    def model(params, x):
        return fn(params["blocks"]["attn"], x)

    for targets in (["c_attn"], ["attn.c_attn"], [path], r".*c_attn", r".*", "all-linear"):
        assert adapted(model, params, targets) == [path], targets
    config = LoraConfig(
        r=2, target_modules=["c_attn"], bias="lora_only", rank_pattern={"c_attn": 3}
    )
    found = plan(model, params, config, X)
    biases = [one for one in found.full if "bias" in one]
    assert found.adapted[0].r == 3 and len(biases) == (name != "Penzai")
    adapters = jax.tree.map(lambda leaf: leaf + 0.5, found.init(jax.random.key(0)))
    got = lora(model)(params, adapters, X)
    assert jnp.allclose(got, model(merge(params, adapters), X), rtol=1e-5)


def test_names_of_several_weights_of_one_module_stay_apart():
    params = {"attn": {f"{kind}_{n}": jnp.ones((8, 8)) for kind in ("w", "W") for n in "QK"}}
    params["attn"] |= {"weight_ih": jnp.ones((8, 8)), "weight_hh": jnp.ones((8, 8))}

    def fn(params, x):
        for weight in params["attn"].values():
            x = x @ weight
        return x

    assert adapted(fn, params, ["w_Q", "weight_hh"]) == ["attn.w_Q", "attn.weight_hh"]
    assert adapted(fn, params, ["W_K"]) == ["attn.W_K"]


def linear(params, x):
    return (x @ params["up"]["w"].astype(x.dtype)) * params["up"]["s"] @ params["deep"]["down"]["w"]


def hint(params, targets, fn=linear, **fields):
    with pytest.raises(PlanError) as caught:
        plan(fn, params, LoraConfig(r=2, target_modules=targets, **fields), X)
    return str(caught.value)


def test_a_hint_never_advises_what_was_given_and_names_what_would_match():
    params = {
        "up": {"w": jnp.ones((8, 6)), "s": jnp.ones(6)},
        "deep": {"down": {"w": jnp.ones((6, 4))}},
    }
    said = hint(params, ["deep"])
    assert "got 'deep', which holds deep.down: 'down' would match" in said
    assert "wanted a module such as up: 'up' would match" in hint(params, ["up_proj"])
    assert "which names no weight that can be adapted: up.s (float32(6,)" in hint(params, ["s"])
    said = hint(params, ["up", "down"], exclude_modules=["up"])
    assert "got 'up'" in said and "up.w (exclude_modules takes it out)" in said
    for pattern in ("down", "up"):  # what a hint says would match does
        assert adapted(linear, params, [pattern])
    numbered = {f"layers.{n}": {"q": {"w": jnp.ones((8, 8))}} for n in range(3)}

    def fn(params, x):
        for n in range(3):
            x = x @ params[f"layers.{n}"]["q"]["w"]
        return x

    said = hint(numbered, ["q_proj"], fn)
    assert said.count("'q' would match") == 1
    assert "got '7', which is the number of no layer" in hint(
        numbered, ["q"], fn, layers_to_transform=[1, 7]
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_a_target_of_whole_numbers_says_why_and_what_helps(dtype):
    params = {
        "up": {"w": jnp.ones((8, 6), dtype), "s": jnp.full(6, 0.5)},
        "deep": {"down": {"w": jnp.ones((6, 4))}},
    }
    why = f"its {jnp.dtype(dtype).name} values have no low-rank sum; give the dequantised weight"
    for targets in (["up"], ["w"], r"up", r"up\.w"):
        said = hint(params, targets) if targets != ["w"] else hint(params, targets)
        assert f"up.w ({why}" in said or f"up.w: {why}" in said, targets
        assert "such as up" not in said
    # Beside others that can be adapted it is no silent exception.
    for targets in (["up", "down"], r".*(up|down)"):
        assert why in hint(params, targets)
    # What helps: the same numbers in a floating dtype that holds them.
    helped = params | {"up": params["up"] | {"w": params["up"]["w"].astype(jnp.bfloat16)}}
    assert sorted(adapted(linear, helped, ["up", "down"])) == ["deep.down.w", "up.w"]
    assert jnp.array_equal(linear(helped, X), linear(params, X))
