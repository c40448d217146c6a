"""Names that families of vision-language models had and have: in loading, merging, converting."""

from __future__ import annotations

import copy
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora_jax import load_config, load_pretrained, merge, plan
from lora_jax.cli.main import main
from lora_jax.peft import renamed_families

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Every row's names on its two sides, as transformers 4.51 and 4.57 have them, or as is said.
LAYOUTS = {
    "llava": (
        [
            "language_model.model.layers.0.q",
            "language_model.lm_head",
            "vision_tower.vision_model.k",
        ],
        ["model.language_model.layers.0.q", "lm_head", "model.vision_tower.vision_model.k"],
    ),
    "mllama": (
        ["language_model.model.layers.0.q", "vision_model.k", "multi_modal_projector"],
        ["model.language_model.layers.0.q", "model.vision_model.k", "model.multi_modal_projector"],
    ),
    "qwen": (
        ["model.layers.0.q", "visual.blocks.0.k", "lm_head"],
        ["model.language_model.layers.0.q", "model.visual.blocks.0.k", "lm_head"],
    ),
    "emu3": (
        ["text_model.model.layers.0.q", "vqmodel.k"],
        ["model.text_model.layers.0.q", "model.vqmodel.k"],
    ),
    "llava of its authors": (
        [
            "model.layers.0.q",
            "model.mm_projector.2",
            "model.vision_tower.vision_tower.vision_model.k",
        ],
        [
            "language_model.model.layers.0.q",
            "multi_modal_projector.linear_2",
            "vision_tower.vision_model.k",
        ],
    ),
    "llava of its authors, now": (
        ["model.layers.0.q", "model.mm_projector.0"],
        ["model.language_model.layers.0.q", "model.multi_modal_projector.linear_1"],
    ),
    "the language model alone": (
        ["language_model.model.layers.0.q", "language_model.lm_head"],
        ["model.layers.0.q", "lm_head"],
    ),
    "idefics": (["model.text_model.layers.0.q"], ["model.layers.0.q"]),
    "data parallel": (["module.layers.0.q"], ["layers.0.q"]),
}


def test_every_row_goes_both_ways():
    for name, (old, new) in LAYOUTS.items():
        for here, there in ((old, new), (new, old)):
            found = renamed_families.find(here, there, whole=True)
            assert found is not None, (name, here)
            assert [found.to_model(one) for one in here] == there, name
            assert [found.to_file(one) for one in there] == here, name


def test_nothing_is_renamed_that_fits_or_that_does_not_fit_wholly():
    old, new = LAYOUTS["llava"]
    assert renamed_families.find(new, new) is None
    assert renamed_families.find([*old, "other.k"], new) is None
    assert renamed_families.find(old[:1], new, whole=True) is None
    assert renamed_families.find(old[:1], new) is not None
    assert renamed_families.find([], new) is None
    # A name that two of the file's would have, which a rename could not tell apart.
    assert renamed_families.find(["language_model.model.q", "model.language_model.q"], new) is None


def test_the_table_is_that_of_transformers():
    """Each class's own mapping, which it keeps to read checkpoints of before."""
    classes = (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaNextForConditionalGeneration,
        transformers.VideoLlavaForConditionalGeneration,
        transformers.PaliGemmaForConditionalGeneration,
        transformers.Gemma3ForConditionalGeneration,
        transformers.InternVLForConditionalGeneration,
        transformers.Mistral3ForConditionalGeneration,
        transformers.MllamaForConditionalGeneration,
        transformers.FuyuForCausalLM,
        transformers.Emu3ForConditionalGeneration,
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2_5_VLForConditionalGeneration,
    )
    for cls in classes:
        mapping = {
            old.lstrip("^").partition("(")[0]: new
            for old, new in cls._checkpoint_conversion_mapping.items()
        }
        old, new = ([f"{one}.x.0.q" for one in side] for side in (mapping, mapping.values()))
        found = renamed_families.find(sorted(old), new)
        assert found is not None, cls
        assert {found.to_model(one) for one in old} == set(new), cls


TEXT = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision, transformers.LlamaConfig(**TEXT), image_token_index=1, tie_word_embeddings=False
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen():
    vision = dict(depth=1, embed_dim=8, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2)
    rope = {"type": "mrope", "mrope_section": [2, 1, 1]}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_scaling": rope}, vision_config=vision, tie_word_embeddings=False
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


# The model, its targets, and what the first names of its modules were.
MODELS = {
    "llava": (
        llava,
        r".*(language_model|vision_tower).*\.(q_proj|v_proj)",
        [("model.language_model.", "language_model.model."), ("model.vision", "vision")],
    ),
    "qwen": (
        qwen,
        r".*(language_model.*(q|v)_proj|visual.*qkv)",
        [("model.language_model.", "model."), ("model.visual.", "visual.")],
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """A tiny model on disk, PEFT's adapter in the names of today and of then, and PEFT's merge."""
    make, targets, renames = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(root / "model")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(root / "new", save_embedding_layers=False)
    (root / "old").mkdir()

    def first(key):
        for now, then in renames:
            if key.startswith(now):
                return then + key.removeprefix(now)
        return key

    tensors = load_file(root / "new" / WEIGHTS)
    assert len({key.split(".lora_")[0] for key in tensors}) > 2
    old = {PREFIX + first(key.removeprefix(PREFIX)): value for key, value in tensors.items()}
    save_file(old, root / "old" / WEIGHTS)
    fields = json.loads((root / "new" / "adapter_config.json").read_text())
    fields["target_modules"] = targets.replace("language_model.*", "layers.*")
    (root / "old" / "adapter_config.json").write_text(json.dumps(fields))
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(root / "merged")
    return root, model, {k: v.detach().numpy() for k, v in merged.state_dict().items()}, first


def products(params, x):
    """A function that multiplies with every matrix of a state dict."""
    return sum(
        jnp.sum(x[: w.shape[1]] @ w.T)
        for name, w in params.items()
        if name.endswith(("_proj.weight", "qkv.weight"))
    )


def state(model):
    return {key: jnp.asarray(value.detach().numpy()) for key, value in model.state_dict().items()}


def assert_close(got, wanted):
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("names", ["old", "new"])
def test_an_adapter_of_either_time_is_loaded_by_the_running_model(names, family, recwarn):
    root, model, wanted, _ = family
    params, x = state(model), jnp.ones(64)
    config = load_config(root / names, params=jax.eval_shape(lambda: params))
    found = plan(products, params, config, x)
    adapters = load_pretrained(root / names, found)
    said = [str(one.message) for one in recwarn if "are read as the model's" in str(one.message)]
    assert len(said) == (2 if names == "old" else 0)
    assert_close(merge(params, adapters), wanted)


def test_patterns_of_then_are_resolved_in_the_names_of_then(family):
    root, model, wanted, first = family
    params, x = state(model), jnp.ones(64)
    one = "model.language_model.layers.0.self_attn.q_proj"
    path = root / "old" / "adapter_config.json"
    content = path.read_bytes()
    try:
        path.write_text(
            json.dumps(json.loads(content) | {"alpha_pattern": {re.escape(first(one)): 5}})
        )
        with pytest.warns(UserWarning, match="are read as the model's"):
            config = load_config(root / "old", params=params)
        found = plan(products, params, config, x)
        with pytest.warns(UserWarning, match="are read as the model's"):
            adapters = load_pretrained(root / "old", found)
        assert {adapters[f"{one}.weight"].scale} == {2.5}
        assert {entry.scale for path, entry in adapters.items() if one not in path} == {1.5}
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("names", ["old", "new"])
def test_merge_finds_the_names_of_the_checkpoint(names, family, tmp_path, capsys):
    """Checkpoints keep the first names, whoever saves them."""
    root, _, _, _ = family
    argv = ["merge", root / "model", root / names, tmp_path / "out"]
    assert main([str(one) for one in argv]) == 0
    said = capsys.readouterr().out
    assert ("are read as the model's" in said) == (names == "new")
    wanted = load_file(root / "merged" / "model.safetensors")
    assert_close(load_file(tmp_path / "out" / "model.safetensors"), wanted)
