"""The floors: what each part may import, walked in subprocesses, and tested on a planted breach."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(lora_jax.__file__).parent

# module -> what importing it must not load
FORBIDDEN = {
    "lora_jax": ("flax", "torch", "torchax", "transformers", "peft", "matplotlib", "rich", "tyro"),
    "lora_jax.rewrite": ("flax", "torch"),
    "lora_jax.peft": ("flax", "torch", "peft", "huggingface_hub"),
    "lora_jax.linen": ("torch", "lora_jax.nnx"),
    "lora_jax.nnx": ("torch", "lora_jax.linen"),
    "lora_jax.torch": ("flax", "transformers", "peft"),
    "lora_jax.models": ("torch", "transformers"),
    "lora_jax.train.step": ("torch", "transformers", "flax.linen", "matplotlib"),
    "lora_jax.parity": ("flax", "torch", "peft", "transformers", "jinja2", "rich", "tyro"),
    "lora_jax.cli": ("flax", "torch", "peft", "rich", "tyro"),
    "lora_jax.cli.main": ("torch", "transformers"),
    "lora_torch_ref": ("jax", "flax", "peft", "transformers"),
}

# The floor of each wing: it imports only wings of lower floors.
FLOORS = [
    {"core"},
    {"rewrite", "optim"},
    {"adapters"},
    {"linen", "nnx", "peft", "torch"},
    {"models"},
    {"train"},
    {"parity"},
    {"cli"},
]


def loaded(module: str, forbidden: tuple[str, ...]) -> list[str]:
    code = f"import sys, {module}; print([n for n in {forbidden!r} if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(out.stdout)


@pytest.mark.every_case
@pytest.mark.parametrize("module", FORBIDDEN)
def test_imports_stay_on_their_floor(module):
    assert loaded(module, FORBIDDEN[module]) == []


def breaches(files: dict[str, str]) -> list[str]:
    """Return every import of a module on the same or a higher floor."""
    level = {name: n for n, names in enumerate(FLOORS) for name in names}
    found = []
    for name, source in files.items():
        own = name.split(".")[0]
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            outside = node.level > len(name.split("."))  # relative to the top of the package
            if node.level - 1 != name.count("."):
                continue
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            found += [
                f"{name} -> {other}"
                for other in names
                if other in level and other != own and level[other] > level[own] and not outside
            ]
    return found


def sources() -> dict[str, str]:
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            files[".".join(parts)] = path.read_text()
    return files


def test_modules_import_only_lower_floors():
    files = sources()
    known = {name for names in FLOORS for name in names}
    assert {name.split(".")[0] for name in files} <= known, "a new wing needs a floor"
    assert breaches(files) == []


def test_a_planted_breach_is_seen():
    assert breaches({"core.lowrank": "from ..rewrite import plan"}) == ["core.lowrank -> rewrite"]
    assert breaches({"rewrite.plan": "from .. import linen"}) == ["rewrite.plan -> linen"]


def imports(files: dict[str, str]) -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    found: dict[str, set[str]] = {}
    for name, source in files.items():
        package = name.split(".")[:-1]
        targets = found.setdefault(name, set())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                base += node.module.split(".") if node.module else []
                inner = {".".join([*base, alias.name]) for alias in node.names}
                targets |= inner & set(files) or {".".join(base)} & set(files)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other, none where there are none."""
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_modules_import_each_other():
    assert circle(imports(sources())) == []
    planted = {"a.x": "from ..b import y", "b.y": "from ..a.x import z", "c": "from .a import x"}
    assert circle(imports(planted)) == ["a.x", "b.y", "c"]


def test_front_ends_are_thin():
    lines = {name: text.count("\n") for name, text in sources().items()}
    assert max(lines[name] for name in ("linen.wrap", "nnx.wrap", "nnx.pure")) < 150


def test_only_the_command_line_prints():
    prints = [
        name
        for name, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert set(prints) <= {"cli.main"}
