"""Only what JAX and Flax promise to keep: every source file is walked for anything private."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(lora_jax.__file__).parent.parent
FOLDERS = ("lora_jax", "parity_tests", "benchmarks")

LIBRARIES = {"jax", "jaxlib", "flax", "optax"}
# A module by its name in a string, as `importlib` and `getattr` take it.
NAMED = re.compile(rf"({'|'.join(sorted(LIBRARIES))})(\.\w+)*\._[a-z]\w*(\.\w+)*")
# What looks into the interpreter rather than at arguments.
FRAMES = {"__code__", "currentframe", "_getframe"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def violations(source: str) -> list[str]:
    """Return every use of a private name of these libraries, and every look at a frame."""
    tree = ast.parse(source)
    theirs = set(_imported(tree))
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if _hidden(alias.name)]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                whole = [f"{module}.{alias.name}" for alias in names]
                found += [name for name in whole if _hidden(name)]
            case ast.Attribute(attr=attr) if attr in FRAMES or (
                private(attr) and _root(node) in theirs
            ):
                found.append(ast.unparse(node))
            case ast.Call(
                func=ast.Name(id="getattr"), args=[object_, ast.Constant(value=str(attr)), *_]
            ) if private(attr) and _root(object_) in theirs:
                found.append(ast.unparse(node))
            case ast.Constant(value=str(text)) if NAMED.fullmatch(text):
                found.append(text)
    return found


def _hidden(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in LIBRARIES and any(map(private, parts))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file has from these libraries."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [(alias.name, alias.asname or alias.name) for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                modules = [(module, alias.asname or alias.name) for alias in names]
            case _:
                continue
        for module, name in modules:
            if module.split(".")[0] in LIBRARIES:
                yield name.split(".")[0]


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def sources() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(__file__)
    }


def test_nothing_private_is_used():
    found = {name: bad for name, source in sources().items() if (bad := violations(source))}
    assert found == {}


def test_every_folder_is_walked():
    assert {Path(name).parts[0] for name in sources()} == set(FOLDERS)


PLANTED = [
    "from jax._src import core",
    "import jax._src.core as c",
    "import jaxlib._jax",
    "from jax import _src",
    "from flax.nnx._src import graph",
    "import jax\njax._src.core.Jaxpr",
    "import jax.numpy as jnp\njnp.linalg._svd(1)",
    "from jax.extend import core\ncore.Jaxpr._eqns",
    "from jax import make_jaxpr\nmake_jaxpr(f)(1)._jaxpr",
    "from flax import nnx\nnnx.Module._pytree__state",
    "import jax\ngetattr(jax, '_src')",
    "import importlib\nimportlib.import_module('jax._src.core')",
    "import sys\nsys._getframe()",
    "def f(): ...\nf.__code__",
]


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_use_is_seen(source):
    assert len(violations(source)) >= 1


ALLOWED = [
    "from __future__ import annotations\nimport jax\njax.__version__",
    "from jax.extend import core\ncore.jaxpr_as_fun",
    "from . import _private\nfrom .jax import _own",
    "class A:\n    def f(self):\n        return self._own",
    "from peft import LoraModel\nLoraModel._check",
    "'jax.lax'",
]


@pytest.mark.parametrize("source", ALLOWED)
def test_what_is_public_passes(source):
    assert violations(source) == []
