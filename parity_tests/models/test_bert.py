"""BERT against transformers in fp32, both measured against transformers in fp64."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax.core import paths
from lora_jax.core.errors import AssetError, ConfigError, DataError
from lora_jax.models import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    from_pretrained,
    load_params,
    save_model,
    to_state_dict,
)
from lora_jax.models.huggingface import torch_name

UNIT = 2.0**-24

# batch, tokens, mean of the embeddings, hidden, layers, heads, intermediate, activation
TINY = {
    "odd sizes": (3, 7, 0.0, 20, 2, 5, 33, "gelu"),
    "one token": (1, 1, 0.0, 8, 1, 1, 9, "gelu"),
    "tanh gelu": (2, 11, 0.0, 12, 3, 2, 24, "gelu_new"),
    "mean 1000": (5, 4, 1e3, 18, 1, 3, 10, "relu"),
}


def tiny_config(hidden=20, layers=2, heads=5, intermediate=33, act="gelu", **more):
    fields = dict(
        vocab_size=61,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=13,
        type_vocab_size=3,
        hidden_act=act,
        # wide enough that attention, GELU and LayerNorm all leave their linear range
        initializer_range=0.4,
    )
    return transformers.BertConfig(**fields, attn_implementation="eager", **more)


def torch_model(kind, config, seed=0, mean=0.0):
    """A transformers model in which no parameter keeps a trivial value, and its fp64 copy."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("word_embeddings.weight"):
                parameter.add_(mean)
    oracle = kind(config).eval()
    oracle.load_state_dict(model.state_dict())
    return model, oracle.double()


def save_tiny(directory, kind=transformers.BertModel, mean=0.0, **config):
    model, oracle = torch_model(kind, tiny_config(**config), mean=mean)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return model, oracle


def inputs(batch, tokens, vocabulary=61, types=3, seed=1):
    """Ids, a mask with a full, a partly masked and (from 3 rows on) a wholly masked row."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (batch, tokens), dtype=np.int32)
    lengths = np.resize([tokens, max(1, tokens // 2), 0], batch)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int32)
    return ids, mask, rng.integers(0, types, (batch, tokens), dtype=np.int32)


def run_torch(model, ids, mask, types=None):
    with torch.no_grad():
        ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(mask)
        types = None if types is None else torch.from_numpy(types).long()
        return model(ids, attention_mask=mask, token_type_ids=types)


def relative(value, oracle):
    value, oracle = np.asarray(value, np.float64), np.asarray(oracle, np.float64)
    return np.linalg.norm(value - oracle) / np.linalg.norm(oracle)


def assert_as_close(ours, theirs, oracle, condition=4.0):
    """parity.md's rule: no further from the oracle than twice PyTorch, and a rounding error."""
    assert oracle.dtype == torch.float64
    ours, theirs, oracle = np.asarray(ours), theirs.numpy(), oracle.numpy()
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == oracle.shape
    assert np.linalg.norm(oracle) > 0
    assert relative(ours, oracle) <= 2 * relative(theirs, oracle) + UNIT * condition


def condition_of(pooled, model):
    """``‖|x||W| + |b|‖ / ‖x·W + b‖`` of the classifier."""
    x = pooled.numpy()
    w, b = (p.detach().numpy() for p in (model.classifier.weight, model.classifier.bias))
    return np.linalg.norm(abs(x) @ abs(w).T + abs(b)) / np.linalg.norm(x @ w.T + b)


@pytest.mark.parametrize("case", TINY)
def test_tiny_models_match_transformers_layer_by_layer(case, tmp_path):
    batch, tokens, mean, *shape = TINY[case]
    sizes = dict(zip(("hidden", "layers", "heads", "intermediate", "act"), shape, strict=True))
    model, oracle = save_tiny(tmp_path, mean=mean, output_hidden_states=True, **sizes)
    args = inputs(batch, tokens)
    bert, params = from_pretrained(tmp_path)
    run = jax.jit(lambda p, *a: bert.apply({"params": p}, *a, capture_intermediates=True))
    (hidden, pooled), taps = run(params, *args)
    theirs, truth = run_torch(model, *args), run_torch(oracle, *args)
    taps = taps["intermediates"]
    layers = [taps["encoder"][f"layer.{i}"]["__call__"][0] for i in range(sizes["layers"])]
    stages = [taps["embeddings"]["__call__"][0], *layers]
    assert len(stages) == len(theirs.hidden_states)
    # LayerNorm subtracts the mean: it magnifies rounding by about mean / deviation
    condition = 4 * (1 + mean)
    for ours, t, o in zip(stages, theirs.hidden_states, truth.hidden_states, strict=True):
        assert_as_close(ours, t, o, condition)
    assert_as_close(hidden, theirs.last_hidden_state, truth.last_hidden_state, condition)
    assert_as_close(pooled, theirs.pooler_output, truth.pooler_output, condition)


def test_gradients_of_every_parameter_match_transformers(tmp_path):
    model, oracle = save_tiny(tmp_path, transformers.BertForSequenceClassification, num_labels=3)
    args, labels = inputs(6, 9), np.array([0, 2, 1, 1, 0, 2])

    def torch_gradients(module):
        ids, mask, types = (torch.from_numpy(x) for x in args)
        logits = module(ids.long(), attention_mask=mask, token_type_ids=types.long()).logits
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        return {name: p.grad for name, p in module.named_parameters()}

    bert, params = from_pretrained(tmp_path, 3)

    def loss(p):
        logs = jax.nn.log_softmax(bert.apply({"params": p}, *args))
        return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], 1))

    ours = to_state_dict(jax.jit(jax.grad(loss))(params))
    theirs, truth = torch_gradients(model), torch_gradients(oracle)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("attention.self.key.bias"):
            # softmax ignores a constant added to a row of scores: the true gradient is zero
            assert np.abs(ours[name]).max() < 1e-6
        else:
            assert_as_close(ours[name], theirs[name], truth[name], condition=16.0)


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    """MiniLM in both libraries, one batch of ordinary width, and transformers' two answers."""
    load = transformers.BertModel.from_pretrained
    model = load(minilm_dir, attn_implementation="eager").eval()
    oracle = load(minilm_dir, attn_implementation="eager").eval().double()
    ids, mask, _ = inputs(4, 24, vocabulary=30522)
    return ids, mask, run_torch(model, ids, mask), run_torch(oracle, ids, mask)


def test_minilm_matches_transformers(minilm, minilm_dir):
    ids, mask, theirs, truth = minilm
    bert, params = from_pretrained(minilm_dir)
    hidden, pooled = jax.jit(bert.apply)({"params": params}, ids, mask)
    assert_as_close(hidden, theirs.last_hidden_state, truth.last_hidden_state)
    assert_as_close(pooled, theirs.pooler_output, truth.pooler_output)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216


def test_minilm_with_a_new_classifier_is_saved_for_plain_transformers(minilm, minilm_dir, tmp_path):
    ids, mask, *_ = minilm
    bert, params = from_pretrained(minilm_dir, 2, seed=5)
    logits = jax.jit(bert.apply)({"params": params}, ids, mask)
    save_model(tmp_path, params, minilm_dir, classes=("ham", "spam"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    assert type(model) is transformers.BertForSequenceClassification
    assert model.config.id2label == {0: "ham", 1: "spam"}
    assert model.config.label2id == {"ham": 0, "spam": 1}
    theirs = run_torch(model, ids, mask).logits
    with torch.no_grad():
        pooled = model.bert(torch.from_numpy(ids).long(), torch.from_numpy(mask)).pooler_output
    condition = condition_of(pooled, model)
    truth = run_torch(model.double(), ids, mask).logits
    assert_as_close(logits, theirs, truth, condition)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("hello world")["input_ids"] == [101, 7592, 2088, 102]


def test_the_classifier_is_drawn_from_the_seed(tmp_path):
    save_tiny(tmp_path, hidden=200)
    drawn = [from_pretrained(tmp_path, 40, seed=seed)[1]["classifier"] for seed in (0, 0, 1)]
    kernels = [classifier["kernel"] for classifier in drawn]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0
    assert float(kernels[0].std()) == pytest.approx(0.4, rel=0.05)
    assert not np.any(drawn[0]["bias"])


def test_a_classifier_in_the_file_is_used_or_refused(tmp_path):
    model, _ = save_tiny(tmp_path, transformers.BertForSequenceClassification, num_labels=3)
    bert, params = from_pretrained(tmp_path, 3)
    assert bert == BertForSequenceClassification(BertConfig.from_file(tmp_path / "config.json"), 3)
    stored = model.classifier.weight.detach().numpy()
    np.testing.assert_array_equal(params["classifier"]["kernel"], stored.T)
    with pytest.raises(AssetError, match="got 3 labels, wanted 2.*num_labels=3"):
        from_pretrained(tmp_path, 2)
    bare, bare_params = from_pretrained(tmp_path)
    assert isinstance(bare, BertModel) and "embeddings" in bare_params


@pytest.mark.parametrize(
    "kind", [transformers.BertModel, transformers.BertForSequenceClassification]
)
def test_paths_are_the_state_dict_names_and_back_bit_for_bit(kind, tmp_path):
    model, _ = save_tiny(tmp_path, kind)
    expected = {name: p.detach().numpy() for name, p in model.named_parameters()}
    params = load_params(tmp_path)
    assert {torch_name(path) for path in paths.flatten(params)} == set(expected)
    state = to_state_dict(params)
    for name, array in expected.items():
        assert state[name].flags.c_contiguous
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_bare_model_keeps_the_prefix_of_its_source(prefix, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    model, _ = save_tiny(source)
    weights = source / "model.safetensors"
    stored = {prefix + name: array for name, array in load_file(weights).items()}
    save_file(stored, weights, {"format": "pt"})
    save_model(target, load_params(source), source)
    again = load_file(target / "model.safetensors")
    assert again.keys() == stored.keys()
    for name in stored:
        np.testing.assert_array_equal(again[name], stored[name])
    loaded = transformers.AutoModel.from_pretrained(target)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_saving_is_byte_stable_and_marked_for_torch(tmp_path):
    save_tiny(tmp_path / "source")
    params = from_pretrained(tmp_path / "source", 2)[1]
    first, second = (
        save_model(tmp_path / name, params, tmp_path / "source") for name in ("first", "second")
    )
    files = sorted(path.name for path in first.iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    with safe_open(first / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((first / "config.json").read_bytes())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["num_labels"] == 2 and config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


def test_saving_refuses_what_transformers_could_not_load(tmp_path):
    save_tiny(tmp_path)
    params = from_pretrained(tmp_path, 2)[1]
    with pytest.raises(ConfigError, match="wanted 2 different names"):
        save_model(tmp_path / "out", params, tmp_path, classes=("a", "a"))
    wrong = paths.replace(params, {"bert.pooler.dense.kernel": np.zeros((20, 19), np.float32)})
    with pytest.raises(
        AssetError, match=r"bert.pooler.dense.weight: got \(19, 20\), wanted \(20, 20\)"
    ):
        save_model(tmp_path / "out", wrong, tmp_path)
    assert not (tmp_path / "out").exists()


def test_old_names_other_floats_and_pretraining_heads_are_read(tmp_path):
    save_tiny(tmp_path)
    expected = to_state_dict(load_params(tmp_path))
    weights = tmp_path / "model.safetensors"
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in expected.items()
    }
    extra = {"cls.predictions.bias": np.zeros(61, np.float32)}
    positions = {"bert.embeddings.position_ids": np.arange(13)[None]}
    for dtype in (np.float64, np.float16, jnp.bfloat16):
        stored = {name: array.astype(dtype) for name, array in old.items()}
        save_file(stored | extra | positions, weights)
        got = to_state_dict(load_params(tmp_path))
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].dtype == np.float32
            np.testing.assert_array_equal(
                got[name], expected[name].astype(dtype).astype(np.float32)
            )


def test_every_misfit_of_the_weights_is_listed_at_once(tmp_path):
    save_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    stored = load_file(weights)
    del stored["pooler.dense.bias"]
    stored["encoder.layer.1.output.dense.weight"] = np.zeros((20, 32), np.float32)
    stored["encoder.layer.7.output.dense.bias"] = np.zeros(20, np.float32)
    stored["bert.pooler.dense.weight"] = stored["pooler.dense.weight"]
    stored["embeddings.LayerNorm.bias"] = np.zeros(20, np.int32)
    save_file(stored, weights)
    with pytest.raises(AssetError) as caught:
        load_params(tmp_path)
    message = str(caught.value)
    assert str(weights) in message and len(message.splitlines()) == 6
    for line in (
        "pooler.dense.bias: got nothing, wanted (20,)",
        "encoder.layer.1.output.dense.weight: got (20, 32), wanted (20, 33)",
        "encoder.layer.7.output.dense.bias: got (20,), wanted no such tensor",
        "pooler.dense.weight: got two",
        "embeddings.LayerNorm.bias: got type I32, wanted one of F64",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", lambda old: old[:-9], "not a complete safetensors file"),
        ("model.safetensors", lambda old: b"", "not a complete safetensors file"),
        ("config.json", lambda old: old[:20], "not valid JSON"),
        ("config.json", lambda old: b"\xff\xfe", "not valid JSON"),
        ("config.json", lambda old: b"[]", "got a JSON list, wanted an object"),
    ],
)
def test_a_broken_file_is_named(name, content, said, tmp_path):
    save_tiny(tmp_path)
    path = tmp_path / name
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(AssetError, match=said) as caught:
        load_params(tmp_path)
    assert str(path) in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path):
    save_tiny(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(AssetError, match="pytorch_model.bin: is a pickle.*safe_serialization=True"):
        load_params(tmp_path)


GOOD = tiny_config().to_dict()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "gelu_fast", "hidden_act: got 'gelu_fast', wanted 'gelu' or"),
        ("hidden_act", None, "hidden_act: got None, wanted 'gelu' or"),
        ("hidden_act", ["gelu"], "hidden_act: got .*, wanted 'gelu' or"),
        ("position_embedding_type", "relative_key", "got 'relative_key', wanted 'absolute'"),
        ("model_type", "roberta", "model_type: got 'roberta', wanted 'bert'"),
        ("is_decoder", True, "is_decoder: got True, wanted False"),
        ("vocab_size", "61", "vocab_size: got '61', wanted a whole number"),
        ("vocab_size", True, "vocab_size: got True, wanted a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers: got 0, wanted at least 1"),
        ("hidden_size", 21, "hidden_size: got 21, wanted a multiple of 5 attention heads"),
        ("layer_norm_eps", 0, "layer_norm_eps: got 0, wanted a positive number"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps: got nan"),
    ],
)
def test_configurations_that_are_refused(field, value, said):
    with pytest.raises(ConfigError, match=said):
        BertConfig.from_dict(GOOD | {field: value})


def test_every_problem_of_a_configuration_is_listed_with_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_act": "xielu", "vocab_size": None}))
    with pytest.raises(ConfigError) as caught:
        BertConfig.from_file(path)
    message = str(caught.value)
    assert str(path) in message
    for said in ("hidden_size: missing", "vocab_size: got None", "hidden_act: got 'xielu'"):
        assert said in message
    assert " vocab_size: missing" not in message


def test_too_many_tokens_are_refused(tmp_path):
    save_tiny(tmp_path)
    bert, params = from_pretrained(tmp_path)
    with pytest.raises(DataError, match="got 14 tokens in a row, wanted at most 13"):
        bert.apply({"params": params}, *inputs(1, 14))
