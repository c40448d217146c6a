"""PyTorch models as JAX functions, so that LoRA fits them under their own names.

torchax runs a module's operations on JAX arrays. The parameters are keyed by their state-dict
names, so that an adapter saved for them is a PEFT adapter of the PyTorch model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import AssetError, raise_all
from .compat import import_torchax

import_torchax()

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torchax.ops.mappings import t2j  # noqa: E402
from torchax.tensor import Environment, Tensor  # noqa: E402

Params = Mapping[str, Any]

BRANCHES = (
    "The PyTorch module asks for the values of arrays, which are not known while JAX traces it. "
    "A transformers model given a mask does not if made with attn_implementation='eager'."
)
AUTHORS_BACKWARD = (
    "the module calls a torch.autograd.Function, whose backward JAX cannot see: gradients would "
    "be wrong. Replace it with plain operations."
)


def from_torch(
    module: torch.nn.Module, *, output: str | None = None
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Return ``fn(params, *args, **kwargs)`` and params: the module in eval mode, in JAX.

    ``params`` holds every parameter by its state-dict name, tied ones once, under the first of
    their names. Buffers are constants of ``fn``. Both are copies: the module is not changed, not
    kept, and may change or go without effect here. ``fn`` is pure; arguments are those of
    ``forward`` with JAX or numpy arrays in the place of tensors. What a module draws at random
    even in eval mode is the same at every call.

    Args:
        module: any module whose operations torchax knows.
        output: the field of the module's output that ``fn`` returns, such as ``"logits"``; None
            for all of it, where a ``transformers`` output becomes a dict.

    Raises:
        AssetError: a parameter holds no values; at the call, when ``params`` are not the
            module's, the output holds anything but arrays and plain values, or the module
            calls a ``torch.autograd.Function``.
        ImportError: when this module is imported without torch or torchax.

    >>> layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    >>> fn, params = from_torch(layers)
    >>> {name: value.shape for name, value in params.items()}
    {'0.weight': (2, 3), '0.bias': (2,)}
    >>> fn(params, np.ones((4, 3), np.float32)).shape
    (4, 2)
    """
    parameters = dict(module.named_parameters())
    raise_all(
        AssetError,
        "these parameters hold no values; load the weights first",
        (f"{name}: on the meta device" for name, p in parameters.items() if p.is_meta),
    )
    env = _Environment()
    empty = {
        name: torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for name, p in parameters.items()
    }
    frame = _copy(module, env, {id(p): empty[name] for name, p in parameters.items()}).eval()

    def fn(params: Params, *args: Any, **kwargs: Any) -> Any:
        _check(params, empty)
        values = {id(empty[name]): env.view(params[name]) for name in empty}
        args, kwargs = jax.tree.map(env.view, (args, kwargs))
        # A module may write to its own fields, so that each call has a copy to itself.
        own = _copy(frame, env, values)
        with env.active():
            try:
                out = own(*args, **kwargs)
            except jax.errors.ConcretizationTypeError as error:
                error.add_note(BRANCHES)
                raise
            return _to_jax(out if output is None else _field(out, output))

    return fn, {name: _array(p) for name, p in parameters.items()}


class _Environment(Environment):
    """PyTorch's operations on JAX arrays; ``no_grad`` tells whether the module has asked for it."""

    no_grad = False

    def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation; under ``torch.no_grad`` its result is a constant to JAX too."""
        if func is torch._C._set_grad_enabled:
            self.no_grad = not args[0]
        if func is torch.ops.aten._to_copy.default and not isinstance(args[0], torch.Tensor):
            # A number beside a tensor in torch.vmap, as in the masks of sliding windows.
            args = (self.view(np.asarray(args[0])), *args[1:])
        result = super().dispatch(func, types, args, kwargs)
        if torch.is_grad_enabled() or any(result is arg for arg in args):
            return result
        asked = self.no_grad or torch.is_inference_mode_enabled()

        def constant(value: Any) -> Any:
            if not isinstance(value, Tensor) or not jnp.issubdtype(value.jax().dtype, jnp.inexact):
                return value
            if not asked:
                raise AssetError(AUTHORS_BACKWARD)
            return value.detach()

        return jax.tree.map(constant, result)

    def view(self, value: Any) -> Any:
        """Return what a module sees of an array; anything else stays what it is."""
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return Tensor(jnp.asarray(value), self)
        return value

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run PyTorch code with this environment, whatever modes the caller is in."""
        with (
            warnings.catch_warnings(),
            jax.numpy_dtype_promotion("standard"),
            torch.inference_mode(False),  # which also lifts torch.no_grad
            torch.device("jax:0"),
            self.override_property(prng=jax.random.key(0)),
            self,
        ):
            self.no_grad = False
            # PyTorch's integers have 64 bits unless told otherwise, JAX's have 32.
            warnings.filterwarnings("ignore", "Explicitly requested dtype int64 ")
            yield


class _Replacing(TorchFunctionMode):
    """While a module is copied, put JAX arrays in the place of the tensors in it."""

    def __init__(self, env: _Environment):
        super().__init__()
        self.env = env

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self.env.view(_array(args[0]))
        return func(*args, **(kwargs or {}))


def _copy(module: torch.nn.Module, env: _Environment, replaced: dict[int, Any]) -> torch.nn.Module:
    """Return the module with its parameters replaced, by identity, and its buffers in JAX."""
    with _Replacing(env):
        return copy.deepcopy(module, dict(replaced))


def _array(tensor: Any) -> jax.Array:
    if hasattr(tensor, "jax"):  # torchax's own, a view too
        return tensor.jax()
    # torchax may share memory with the tensor, which its owner may write to.
    return jnp.array(t2j(tensor.detach(), use_dlpack=False), copy=True)


def _check(params: Params, wanted: Mapping[str, torch.Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    got = {name: tuple(jnp.shape(value)) for name, value in params.items()}
    problems = [
        f"{name}: got {got.get(name, 'nothing')}, wanted {shapes.get(name, 'no such parameter')}"
        for name in sorted(got.keys() | shapes.keys())
        if got.get(name) != shapes.get(name)
    ]
    raise_all(AssetError, "these parameters are not the module's", problems)


def _field(out: Any, name: str) -> Any:
    fields = dict(out) if isinstance(out, Mapping) else getattr(out, "__dict__", {})
    if fields.get(name) is None:
        has = ", ".join(key for key, value in fields.items() if value is not None)
        raise AssetError(f"output={name!r}: the module returns {has or type(out).__name__}")
    return fields[name]


def _to_jax(out: Any, where: str = "") -> Any:
    """Return the output with JAX arrays and plain containers."""
    match out:
        case torch.Tensor():
            return _array(out)
        case None | bool() | int() | float() | str():
            return out
        case Mapping():
            return {key: _to_jax(value, f"{where}[{key!r}]") for key, value in out.items()}
        case list() | tuple():
            values = [_to_jax(value, f"{where}[{n}]") for n, value in enumerate(out)]
            return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)
    raise AssetError(
        f"the module's output{where}: got {type(out).__name__}, wanted arrays; choose a field with "
        "from_torch(…, output=…), or pass use_cache=False for a cache"
    )
