"""``import torchax``, also beside a PyTorch that has dropped overloads torchax names.

torchax 0.0.13 looks up overloads for named dimensions as it is imported, to list them in its
tables. PyTorch 2.13 has no named dimensions any more, so that the import fails. Nothing can call
an overload that does not exist: a stand-in for it is all that the tables need, and only until the
import is done. Where torchax imports by itself, PyTorch is not touched.

As torchax registers its device, PyTorch's own ``torch.random.fork_rng`` asks it for the state of a
device by number, which its function does not take. It is made to take one and pass over it. And
as it calls that device available, ``torch.compile`` asks PyTorch for the device's stream, which
PyTorch has none of. Where it has none, the device says that it is not available.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

INSTALL = 'pip install "lora_jax[torch]"'

# Of torch.ops.aten: what torchax 0.0.13 looks up and PyTorch 2.13 has not.
NAMED_DIMENSIONS = {
    "all": ("dimname", "dimname_out"),
    "index_add": ("dimname",),
    "index_copy": ("dimname",),
    "index_copy_": ("dimname",),
    "index_fill": ("Dimname_Scalar", "Dimname_Tensor"),
    "index_fill_": ("Dimname_Scalar", "Dimname_Tensor"),
    "norm": (
        "names_ScalarOpt_dim",
        "names_ScalarOpt_dim_dtype",
        "names_dtype_out",
        "names_out",
    ),
    "prod": ("dim_Dimname",),
    "std": ("correction_names", "correction_names_out", "names_dim", "names_out"),
    "std_mean": ("correction_names", "names_dim"),
    "unbind": ("Dimname",),
}


def import_torchax() -> ModuleType:
    """Return torchax with the tables of its operations loaded.

    Raises:
        ImportError: torch or torchax is missing, or the two do not fit each other; the message
            has the command that installs versions that do.
    """
    try:
        try:
            torchax = _load()
        except AttributeError:
            with stand_ins():
                torchax = _load()
        device = importlib.import_module("torchax.device_module")
        _take_a_device(device)
        _have_no_streams(device)
        return torchax
    except (ImportError, AttributeError) as error:
        raise ImportError(f"torchax cannot be imported: {error}; {INSTALL}") from error


@contextmanager
def stand_ins() -> Iterator[list[str]]:
    """Give ``torch.ops.aten`` every overload of ``NAMED_DIMENSIONS`` that it lacks, for a while.

    Yields:
        Their names; empty where none is lacking.
    """
    from torch import ops

    lacking = [
        (getattr(ops.aten, name), overload)
        for name, overloads in NAMED_DIMENSIONS.items()
        for overload in overloads
        if not hasattr(getattr(ops.aten, name), overload)
    ]
    for packet, overload in lacking:
        setattr(packet, overload, object())
    try:
        yield [f"{packet}.{overload}" for packet, overload in lacking]
    finally:
        for packet, overload in lacking:
            delattr(packet, overload)


def _take_a_device(module: ModuleType) -> None:
    """Let ``get_rng_state`` take the device that PyTorch passes, where it takes nothing."""
    own = module.get_rng_state
    if not inspect.signature(own).parameters:
        module.get_rng_state = lambda device=None: own()  # pyright: ignore


def _have_no_streams(module: ModuleType) -> None:
    """Let PyTorch ask for no stream of the device, where it is not linked with any."""
    import torch

    try:
        torch.accelerator.current_device_index()
    except RuntimeError:
        module.is_available = lambda: False  # pyright: ignore


def _load() -> ModuleType:
    before = set(sys.modules)
    try:
        importlib.import_module("torchax.decompositions")
        return importlib.import_module("torchax")
    except AttributeError:
        # A part that stayed behind would not become an attribute of torchax the next time.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchax":
                del sys.modules[name]
        raise
