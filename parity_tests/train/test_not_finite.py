"""No path from input to result of ``predict`` and ``finetune`` lets a NaN or an infinity out."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli.main import main
from lora_jax.core.errors import AssetError, TrainingError
from lora_jax.models import load_params, save_model
from lora_jax.train.predict import predict
from parity_tests.models import tiny

TEXT = "win cash prize now"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    here = tmp_path_factory.mktemp("made")
    tiny.save_model(here / "model", layers=1)
    tiny.save_run(here / "run", here / "model")
    tiny.save_table(here / "table.csv", n=40)
    return here


@pytest.fixture
def here(made, tmp_path):
    return shutil.copytree(made, tmp_path / "here")


def change(path, name, change):
    tensors = load_file(path)
    [key] = [key for key in tensors if key.endswith(name)]
    tensors[key] = change(tensors[key].copy())
    save_file(tensors, path, metadata={"format": "pt"})
    return key


def with_nan(value):
    value.flat[3] = np.nan
    return value


def commands(here):
    model, small = str(here / "model"), ["--epochs", "1", "--max-length", "12"]
    data = ["--data", str(here / "table.csv"), "--output", str(here / "out"), *small]
    return {
        "predict": ["predict", str(here / "run"), TEXT, "--model", model],
        "json": ["predict", str(here / "run"), TEXT, "--model", model, "--json"],
        "merge": ["merge", str(here / "run"), str(here / "out"), "--model", model],
        "finetune": ["finetune", "--model", model, *data],
    }


def refused(capsys, argv, *said, code=2):
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert err.startswith("lora-jax: ") and err.count("\n") <= 3
    for words in said:
        assert words in err, err
    assert "learning rate" not in err or "no learning rate" in err
    assert not {"nan", "inf", "infinity"} & set(out.lower().split())
    return out


def test_a_base_with_nan_is_refused_by_name(here, capsys):
    key = change(here / "model/model.safetensors", "layer.0.output.dense.weight", with_nan)
    for name, argv in commands(here).items():
        out = refused(capsys, argv, "not finite", key, "1 of 960 values")
        assert name == "finetune" or not out
    assert not list((here / "out").glob("*"))


def test_an_infinity_in_half_precision_is_refused(here):
    def halved(value):
        value = value.astype(np.float16)
        value[0] = np.inf
        return value

    change(here / "model/model.safetensors", "pooler.dense.bias", halved)
    with pytest.raises(AssetError, match="pooler.dense.bias: 1 of 24 values"):
        load_params(here / "model")


def test_token_ids_beyond_the_vocabulary_are_refused_by_name(here, capsys):
    path = here / "model/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["cash"] = 99999
    path.write_text(json.dumps(content))
    for name, argv in commands(here).items():
        if name != "merge":
            refused(
                capsys, argv, "tokenizer does not belong to the model", "'cash': has the id 99999"
            )


def test_padding_beyond_the_vocabulary_is_refused(here, capsys):
    tiny.edit_json(here / "model/config.json", pad_token_id=5000)
    refused(capsys, commands(here)["predict"], "has the id 5000")


def test_probabilities_that_overflow_are_no_result(here, capsys):
    big = np.float32(3e38)
    change(here / "run/adapter_model.safetensors", "classifier.weight", lambda x: np.sign(x) * big)
    for name in ("predict", "json"):
        out = refused(capsys, commands(here)[name], "no finite probabilities", TEXT)
        assert not out
    with pytest.raises(TrainingError, match="1 of 2 texts|2 of 2 texts"):
        predict(here / "run", [TEXT, "lunch"], model=str(here / "model"))


def test_a_model_that_overflows_is_said_before_the_first_step(here, capsys):
    change(here / "model/model.safetensors", "word_embeddings.weight", lambda x: x * 0 + 3e38)
    change(here / "model/model.safetensors", "position_embeddings.weight", lambda x: x * 0 + 3e38)
    refused(capsys, commands(here)["finetune"], "before the first step", "no learning rate will do")
    assert not list((here / "out").glob("adapter*"))


def test_a_merged_model_is_finite_or_not_written(here, tmp_path):
    params = dict(load_params(here / "model"))
    params["pooler.dense"] = {
        "kernel": params["pooler.dense"]["kernel"] * np.inf,
        "bias": params["pooler.dense"]["bias"],
    }
    with pytest.raises(AssetError, match="pooler.dense.weight: 576 of 576"):
        save_model(tmp_path / "out", params, here / "model")
    assert not (tmp_path / "out").exists()
