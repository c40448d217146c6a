"""Adapters on the Hugging Face hub: pushing them, with a card that says how to load them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

from ..core import paths
from ..core.adapter import Adapters
from ..core.config.lora_config import LoraConfig
from ..core.errors import AssetError, OutputError
from ..core.io import hub_endpoint, network
from ..core.io.network import bytes_in, failure, within
from ..core.shown_text import escaped, in_markdown
from ..rewrite import Plan
from .download import MISSING_HUB
from .files import load_config, save_pretrained
from .names.naming import Names

CARD_NAME = "README.md"

# The transformers class of each of PEFT's task types.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

# What vLLM takes as --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def push_to_hub(
    repo_id: str,
    plan: Plan,
    adapters: Adapters,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    names: Names = paths.module_of,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload the adapter",
) -> str:
    """Write adapters to a repository of the hub, in one commit; it is created if need be.

    Args:
        repo_id: ``user/repo``.
        plan: the plan that the adapters belong to.
        adapters: what is saved.
        base_model: the base model's hub id, recorded for users.
        task_type: PEFT's task type, such as ``"CAUSAL_LM"``.
        names: as in ``save_pretrained``.
        card: the text of ``README.md``; by default ``model_card(…)``, unless the repository has
            a card already, which stays.
        private: whether a new repository is private; by default what the owner has chosen.
        token: the hub's token; by default the one that ``huggingface_hub`` knows.
        message: the commit's first line.

    Returns:
        The commit's address.

    Raises:
        AdapterError: as ``save_pretrained``; nothing is sent.
        OutputError: the hub cannot be reached or refuses, its client is not installed, or sending
            was given up after a minute and a second for each 16 KiB: the commit may then be there
            or not.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise OutputError(MISSING_HUB) from error
    where = f"{hub_endpoint.endpoint()}/{repo_id}"
    if not _HUB_ID.fullmatch(repo_id):
        raise OutputError(f"repo_id: got {repo_id!r}, wanted user/repo")
    for variable in filter(hub_endpoint.is_set, hub_endpoint.OFFLINE):
        raise OutputError(f"cannot write to {where}: {variable} is set")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "adapter"
        save_pretrained(
            directory, plan, adapters, base_model=base_model, task_type=task_type, names=names
        )
        api = HfApi(endpoint=hub_endpoint.endpoint(), token=token)
        try:
            hub_endpoint.probe(hub_endpoint.endpoint())
            within(lambda: api.create_repo(repo_id, private=private, exist_ok=True), where)
            if card is None and not within(lambda: api.file_exists(repo_id, CARD_NAME), where):
                card = model_card(
                    load_config(directory), repo_id, base_model=base_model, task_type=task_type
                )
            if card is not None:
                (directory / CARD_NAME).write_text(card, encoding="utf-8")
            return _send(api, repo_id, directory, message)
        except AssetError as error:
            raise OutputError(f"cannot write to {where}: {error}") from error
        # Its failures share no base class, and each means the same here.
        except Exception as error:
            raise OutputError(
                f"cannot write to {where}: {hub_endpoint.one_line(failure(error))}"
            ) from error


def model_card(
    config: LoraConfig,
    repo_id: str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> str:
    """Return the text of a ``README.md``: the configuration, and how to load the adapter.

    Args:
        config: as it is in the file.
        repo_id: where the adapter is.
        base_model: the base model's hub id or directory, if recorded.
        task_type: PEFT's task type, if recorded.

    >>> card = model_card(LoraConfig(r=4, target_modules=["q"]), "me/ours", base_model="org/base")
    >>> 'base_model: "org/base"' in card, 'load_pretrained("me/ours", found)' in card
    (True, True)
    """
    base = base_model or "the/base-model"
    sections = [
        _front_matter(base_model),
        f"# {in_markdown(repo_id.rpartition('/')[2])}",
        f"A LoRA adapter for {_code(base_model)}, in the file format of PEFT, written by lora_jax."
        if base_model
        else "A LoRA adapter in the file format of PEFT, written by lora_jax.",
        "## Configuration\n\n" + _table(config),
        "## Load it in PEFT\n\n" + _python(_peft_lines(repo_id, base, task_type)),
        "## Serve it with vLLM\n\n" + _vllm(config, repo_id, base, task_type),
        "## Load it in JAX\n\n" + _python(_jax_lines(repo_id, config)),
    ]
    return "\n\n".join(sections) + "\n"


def _send(api: Any, repo_id: str, directory: Path, message: str) -> str:
    """Return the address of a commit with these files, or give up where it takes too long."""
    size = bytes_in(directory)

    def upload() -> Any:
        return api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=message)

    try:
        commit = within(
            upload,
            f"sending {size:,} bytes to {repo_id}",
            say=_log.warning,
            limits=network.LIMITS.of_sending(size),
        )
    except AssetError as error:
        raise AssetError(f"{error}; look there whether they have arrived") from error
    return commit.commit_url


def _front_matter(base_model: str | None) -> str:
    lines = ["---", "library_name: peft", "tags:", "- lora", "- lora_jax"]
    # The hub refuses a card whose base model is a directory of the author's.
    if base_model and _HUB_ID.fullmatch(base_model):
        lines.insert(1, f"base_model: {json.dumps(base_model)}")
    return "\n".join([*lines, "---"])


def _table(config: LoraConfig) -> str:
    """Return the fields that every reader wants, and those that are not at their defaults."""
    default, rows = LoraConfig(), ["| field | value |", "|---|---|"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        always = field.name in ("r", "lora_alpha", "target_modules")
        if always or (field.compare and value != getattr(default, field.name)):
            rows.append(f"| `{field.name}` | {_code(_json(value))} |")
    return "\n".join(rows)


def _peft_lines(repo_id: str, base: str, task_type: str | None) -> list[str]:
    model = _CLASSES.get(task_type or "", "AutoModel")
    return [
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f"base = {model}.from_pretrained({json.dumps(base)})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo_id)})",
    ]


def _vllm(config: LoraConfig, repo_id: str, base: str, task_type: str | None) -> str:
    """Return the command, or why the adapter must be merged for vLLM."""
    largest = max([config.r, *config.rank_pattern.values()])
    rank = next((r for r in _VLLM_RANKS if r >= largest), None)
    if config.alora_invocation_tokens:
        return (
            "It acts from its invocation tokens on (aLoRA), so it cannot be merged: it needs a "
            "server that knows `alora_invocation_tokens`."
        )
    reasons = {
        "it is DoRA's": config.use_dora,
        "it has biases beside B": config.lora_bias,
        "it trains biases": config.bias != "none",
        "it trains whole modules": bool(config.modules_to_save),
        f"its rank {largest} is above {_VLLM_RANKS[-1]}": rank is None,
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if task_type not in (None, "CAUSAL_LM"):
        against.append(f"its task is {in_markdown(task_type)}")
    if against:
        return (
            f"vLLM does not serve this adapter beside its base ({', '.join(against)}): merge it "
            "with `lora-jax merge`, and serve the merged model."
        )
    lines = [
        f"vllm serve {_shell(base)} --enable-lora --max-lora-rank {rank} \\",
        f"  --lora-modules adapter={_shell(repo_id)}",
    ]
    return "\n".join(["```sh", *lines, "```"])


def _jax_lines(repo_id: str, config: LoraConfig) -> list[str]:
    name, tokens = json.dumps(repo_id), config.alora_invocation_tokens
    mask, active, name_of_mask = [], "", ""
    if tokens:
        mask = [f"active = alora_mask(input_ids, {list(tokens)})"]
        active, name_of_mask = ", active=active", "alora_mask, "
    return [
        f"from lora_jax import {name_of_mask}load_config, load_pretrained, lora, plan",
        "",
        "# fn(params, *inputs) is any JAX function; its params have the base model's names",
        f"found = plan(fn, params, load_config({name}), *inputs)",
        f"adapters = load_pretrained({name}, found)",
        *mask,
        f"outputs = lora(fn)(params, adapters, *inputs{active})",
    ]


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _code(text: str) -> str:
    return "`" + escaped(text).replace("`", "'").replace("|", "\\|") + "`"


def _shell(text: str) -> str:
    return "'" + escaped(text).replace("'", "'\\''") + "'"


def _json(value: Any) -> str:
    return json.dumps(dict(value) if hasattr(value, "items") else value, ensure_ascii=False)
