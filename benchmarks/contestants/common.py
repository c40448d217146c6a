"""What contestants share: compiling ahead of time, PyTorch's threads, and their settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax import __version__
from lora_jax.rewrite.frugality import count

from ..case import Arrays, Unsupported, Work, as_arrays
from ..measure.environment import cores


@dataclass(frozen=True)
class Compiled:
    """A JAX function compiled for some arguments, what that took, and the FLOPs of a call."""

    call: Any
    seconds: float
    flops: int

    def work(
        self, step: Callable[[], Any], read: Callable[[Any], Arrays] = as_arrays, *, calls: int = 1
    ) -> Work:
        """Return the work of a step that calls it this often."""
        return Work(step, read, self.seconds, calls * self.flops, program=self.call.as_text)


def compiled(fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """Compile ``fn`` for arguments like these, as ``jax.jit`` would at the first call.

    The FLOPs are those of the program before XLA optimises it, every step of a scan counted.

    Args:
        fn: any JAX function.
        *args: its arguments, arrays or ``jax.ShapeDtypeStruct``.
        donate: arguments whose memory the results may take.
    """
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - start
    return Compiled(program, seconds, count(fn, *args))


def jax_work(fn: Callable[..., Any], *args: Any, read: Callable[[Any], Arrays] = as_arrays) -> Work:
    """Return the work of calling ``fn`` with these arguments, again and again."""
    program = compiled(fn, *args)

    def step() -> Any:
        return jax.block_until_ready(program.call(*args))

    return program.work(step, read)


def jax_settings() -> Mapping[str, str]:
    """Return what else decides the speed of JAX."""
    return {
        "lora_jax": __version__,
        "backend": jax.default_backend(),
        "threads": str(cores()),
        "matmul precision": str(jax.config.values["jax_default_matmul_precision"] or "default"),
    }


def torch_ready() -> Any:
    """Return PyTorch, with as many threads as JAX has, and new tensors on JAX's kind of device.

    Its threads would else be half of the logical cores on some machines; XLA takes them all.

    Raises:
        ImportError: it is not installed.
        Unsupported: see ``torch_device``.
    """
    import torch

    torch.set_num_threads(cores())
    if (device := torch_device()) != "cpu":
        torch.set_default_device(device)
    return torch


def torch_settings() -> Mapping[str, str]:
    """Return what else decides the speed of PyTorch."""
    torch = torch_ready()
    return {
        "threads": str(torch.get_num_threads()),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


def torch_device() -> str:
    """Return where PyTorch's contestants put their tensors: on the kind of device that JAX has.

    Raises:
        ImportError: it is not installed.
        Unsupported: it has no such device, and a race between two kinds would say nothing.
    """
    import torch

    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise Unsupported(f"PyTorch has no {backend} here, which JAX runs on")


def torch_work(
    step: Callable[[], Any],
    read: Callable[[Any], Arrays] | None = None,
    prepare: Callable[[], Any] = lambda: None,
) -> Work:
    """Return the work of a PyTorch step, waited for where it runs on an accelerator.

    Raises:
        Unsupported: see ``torch_device``.
    """
    torch, device = torch_ready(), torch_device()

    def waited() -> Any:
        result = step()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return Work(waited, read or torch_arrays, prepare=prepare)


def torch_arrays(result: Any) -> Arrays:
    """Return a PyTorch result, a tensor or a mapping of tensors, as arrays."""
    named = result if isinstance(result, Mapping) else {"result": result}
    return as_arrays({name: on_host(value) for name, value in named.items()})


def on_host(value: Any) -> Any:
    """Return a tensor as a NumPy array in float64, anything else as it is."""
    return value.detach().double().cpu().numpy() if hasattr(value, "detach") else value
