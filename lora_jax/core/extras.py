"""Packages that only the demo needs, asked for before any work is lost to their absence."""

from __future__ import annotations

import importlib

from .errors import AssetError, raise_all


def require(*modules: str) -> None:
    """Raise unless these modules can be imported.

    Raises:
        AssetError: lists those that cannot, with the command that installs them.

    >>> require("json", "no_such_module")
    Traceback (most recent call last):
        ...
    lora_jax.core.errors.AssetError: packages are missing; pip install "lora_jax[demo]":
      no_such_module: No module named 'no_such_module'
    """
    problems = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            problems.append(f"{name}: {error}")
    raise_all(AssetError, 'packages are missing; pip install "lora_jax[demo]"', problems)
