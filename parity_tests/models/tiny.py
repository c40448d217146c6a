"""A BERT of a few thousand parameters and a table that it can learn, written as users have them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lora_jax import LoraConfig, save_pretrained
from lora_jax.peft import open_adapter, write_adapter
from lora_jax.train import classifier as classifiers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SPAM = "win prize cash free claim now call urgent offer guaranteed".split()
HAM = "lunch home later love meeting tomorrow sorry dinner thanks okay".split()
COMMON = "the a to you me at in on is for".split()


def save_model(directory, seed=0, layers=2):
    """Write config.json, model.safetensors and tokenizer.json of a random BERT."""
    words = [*SPECIAL, *SPAM, *HAM, *COMMON]
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        type_vocab_size=2,
        # wide enough that the classes can be told apart
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # as MiniLM's file does, and as nobody wants it
    tokenizer.enable_padding(length=17)
    tokenizer.enable_truncation(17)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def texts(n, seed=0):
    """Return n different texts and their labels, in turn."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        own = (SPAM, HAM)[i % 2]
        words = [*rng.choice(own, 3), *rng.choice(COMMON, 4)]
        rows.append((" ".join(rng.permutation(words)), ("spam", "ham")[i % 2]))
    return rows


def save_table(path, n=200, seed=0):
    """Write a .csv with the columns text and label."""
    path.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in texts(n, seed)))
    return path


def save_run(directory, model, classes=("ham", "spam"), max_length=12, scale=0.5):
    """Write what ``finetune`` would have, its adapters drawn at random."""
    made = classifiers.load_classifier(model, tuple(classes), max_length)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=("query", "value"), modules_to_save=["classifier"]
    )
    plan = made.plan(config, 1)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: scale * rng.standard_normal(leaf.shape).astype(np.float32),
        plan.init(jax.random.key(0)),
    )
    save_pretrained(
        directory, plan, adapters, base_model=made.base_model, task_type="SEQ_CLS", overwrite=True
    )
    record = classifiers.Record(made.base_model, made.classes, made.max_length)
    (directory / classifiers.RECORD_NAME).write_bytes(classifiers.encode_record(record, {}))
    return directory


def save_adapter(directory, run):
    """Write a run's adapter without its classifier, as other tools write one."""
    file, adapters = open_adapter(run)
    config = dataclasses.replace(file.config, modules_to_save=None)
    pairs = {name: one for name, one in adapters.items() if "classifier" not in name}
    return write_adapter(directory, dataclasses.replace(file, config=config, task_type=None), pairs)


def edit_json(path, **fields):
    """Change fields of a JSON file; a value of ``...`` removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
