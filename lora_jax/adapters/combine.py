"""Weighted combinations of adapters, by PEFT's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from ..core.adapter import Adapter, Adapters, rank
from ..core.buffers import apart
from ..core.errors import AdapterError, raise_all
from ..core.initializers import fold_in_path
from .arithmetic import HEADING
from .svd import (
    Factors,
    concatenated,
    dot,
    factors,
    misfits,
    norm,
    padded,
    pairs_of,
    ratio,
    scale_of,
    scaled_factors,
    svd,
    with_factors,
)


@dataclass(frozen=True)
class Combination:
    """What one ``combination_type`` does.

    Args:
        prune: which values are set to zero first: none (``""``), the smallest
            (``"magnitude"``), or random ones (``"random"``, and the rest is made up for them).
        elect: whether only values of the majority's sign count, and are averaged.
        on_delta: whether this happens to every ``ΔW``, with an SVD after it, or to A and to B.
    """

    prune: str = ""
    elect: bool = False
    on_delta: bool = False


COMBINATIONS = {
    "svd": Combination(on_delta=True),
    "linear": Combination(),
    "ties": Combination("magnitude", elect=True),
    "ties_svd": Combination("magnitude", elect=True, on_delta=True),
    "dare_linear": Combination("random"),
    "dare_linear_svd": Combination("random", on_delta=True),
    "dare_ties": Combination("random", elect=True),
    "dare_ties_svd": Combination("random", elect=True, on_delta=True),
    "magnitude_prune": Combination("magnitude"),
    "magnitude_prune_svd": Combination("magnitude", on_delta=True),
}

CAT = "cat"
SIGN_METHODS = ("total", "frequency")


def combine(
    adapters: Sequence[Adapters],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: Key[Array, ""] | None = None,
) -> dict[str, Adapter]:
    """Return one adapter of each path for ``Σ wₖ·ΔWₖ``, in one of PEFT's ways.

    ``cat`` is exact, ``svd`` the best approximation of its rank. ``linear`` and what is built
    on it mix A with A and B with B by ``sign(ws)·√|ws|`` and ``√|ws|``, so that the products
    of one adapter's A with another's B stay in: see ``combination_error``. A path that some
    adapters lack is combined from the others. The new scale is 1.

    PEFT prunes and elects for each module; here, for each index of the stacked axes. All
    types but ``cat``, ``linear`` and ``svd`` with ``_svd`` in their name form ``ΔW``.

    Args:
        adapters: of one model.
        weights: one for each of them; negative ones subtract.
        combination_type: ``"cat"`` or a name in ``COMBINATIONS``. One adapter alone is
            always combined by ``"linear"``, as in PEFT.
        svd_rank: the new rank of the ``svd`` types; if not given, the largest there is.
        svd_clamp: a quantile of the values of A and B together to which the ``svd`` types
            clamp them.
        density: the share of values that pruning keeps, ``0 < density <= 1``.
        majority_sign_method: ``"total"`` elects the sign of the sum, ``"frequency"`` that of
            the sum of the signs.
        key: what the ``dare`` types draw from.

    Raises:
        AdapterError: lists wrong arguments, paths whose axes, shapes or dtypes differ, whose
            ranks differ where A is mixed with A, and leaves trained in full.

    Source: PEFT 0.21.2 ``add_weighted_adapter``; TIES, arXiv 2306.01708; DARE, arXiv
    2311.03099. With ``use_rslora`` PEFT gives the result the scale √r, so it is √r times as
    large there.

    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)}
    >>> two = {"w": Adapter(jnp.ones((3, 1)), -jnp.ones((1, 2)), scale=1.0)}
    >>> combined = combine([one, two], [0.5, -1.0], "cat")
    >>> combined["w"].a.tolist()[0], combined["w"].scale
    ([1.0, -1.0], 1.0)
    """
    name = "linear" if len(adapters) == 1 else combination_type
    problems = _problems(adapters, weights, name, svd_rank, density, majority_sign_method, key)
    raise_all(AdapterError, HEADING, problems)
    trees = [pairs_of(tree) for tree in adapters]
    r = svd_rank or max(rank(one) for tree in trees for one in tree.values())
    combined = {}
    for path in dict.fromkeys(path for tree in trees for path in tree):
        present = [n for n, tree in enumerate(trees) if path in tree]
        pairs = [trees[n][path] for n in present]
        mixer = _Mixer(
            COMBINATIONS.get(name, Combination()),
            [float(weights[n]) for n in present],
            1.0 if density is None else density,
            majority_sign_method,
            None if key is None else fold_in_path(key, path),
        )
        if name == CAT:
            pair = concatenated(mixer.weighted(pairs))
        elif mixer.kind.on_delta:
            pair = clamped(mixer.by_svd(pairs, r), svd_clamp)
        else:
            pair = mixer.by_factors(pairs)
        combined[path] = with_factors(pairs[0], pair, 1.0)
    return apart(combined, adapters)


def combination_error(
    adapters: Sequence[Adapters], weights: Sequence[float], combined: Adapters
) -> dict[str, float]:
    """Return ``‖ΔW − Σ wₖ·ΔWₖ‖ / ‖Σ wₖ·ΔWₖ‖`` of a combination, by path (Frobenius norms).

    Raises:
        AdapterError: lists what cannot be compared, as ``combine`` does.

    >>> one = {"w": Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=1.0)}
    >>> two = {"w": Adapter(jnp.ones((3, 1)), -2 * jnp.ones((1, 2)), scale=1.0)}
    >>> errors = {}
    >>> for name in ("cat", "linear"):
    ...     combined = combine([one, two], [0.5, -0.5], name)
    ...     errors[name] = round(combination_error([one, two], [0.5, -0.5], combined)["w"], 6)
    >>> errors
    {'cat': 0.0, 'linear': 1.0}
    """
    problems = misfits([*adapters, combined])
    problems += [f"{path}: not combined" for tree in adapters for path in tree.keys() - combined]
    raise_all(AdapterError, "these adapters cannot be compared", problems)
    terms = [(pairs_of(tree), w) for tree, w in zip(adapters, weights, strict=True)]
    errors = {}
    for path, one in pairs_of(combined).items():
        exact = [scaled_factors(tree[path], w) for tree, w in terms if path in tree]
        difference = concatenated([scaled_factors(one, -1.0), *exact])
        errors[path] = ratio(norm(difference), norm(concatenated(exact)))
    return errors


def keep_mask(
    key: Key[Array, ""], number: int, part: str, density: float, shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Return which values of a tensor the ``dare`` types keep.

    Args:
        key: the path's key: ``fold_in_path(key, path)``.
        number: which of the adapters that have this path, from 0.
        part: ``"a"``, ``"b"`` or ``"delta"``.
        density: the probability of being kept.
        shape: of the tensor in matrix form.
    """
    own = fold_in_path(jax.random.fold_in(key, number), part)
    return jax.random.bernoulli(own, density, shape)


@dataclass(frozen=True)
class _Mixer:
    """One combination of one path."""

    kind: Combination
    weights: Sequence[float]
    density: float
    sign_method: str
    key: Key[Array, ""] | None

    def weighted(self, pairs: Sequence[Adapter]) -> list[Factors]:
        return [scaled_factors(one, w) for one, w in zip(pairs, self.weights, strict=True)]

    def by_svd(self, pairs: Sequence[Adapter], r: int) -> Factors:
        if self.kind == COMBINATIONS["svd"]:
            u, sigma, vt = svd(concatenated(self.weighted(pairs)))
        else:
            deltas = [dot(*scaled_factors(one)) for one in pairs]
            mixed = self.mix(deltas, self.weights, "delta")
            u, sigma, vt = jnp.linalg.svd(mixed, full_matrices=False)
        return padded((u[..., :r], (sigma[..., None] * vt)[:, :r]), r)

    def by_factors(self, pairs: Sequence[Adapter]) -> Factors:
        scales = [w * scale_of(one) for one, w in zip(pairs, self.weights, strict=True)]
        roots = [math.sqrt(abs(s)) for s in scales]
        signed = [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)]
        ab = [factors(one) for one in pairs]
        return self.mix([a for a, _ in ab], signed, "a"), self.mix([b for _, b in ab], roots, "b")

    def mix(
        self, tensors: Sequence[Float[Array, "s m n"]], weights: Sequence[float], part: str
    ) -> Float[Array, "s m n"]:
        """Prune, weight, and sum or let the majority's sign decide."""
        pruned = jnp.stack([self.pruned(one, n, part) for n, one in enumerate(tensors)])
        weighted = pruned * jnp.asarray(weights, pruned.dtype)[:, None, None, None]
        if not self.kind.elect:
            return weighted.sum(0)
        sign = jnp.sign(pruned)
        votes = pruned if self.sign_method == "total" else sign
        agrees = sign == jnp.where(votes.sum(0) >= 0, 1, -1).astype(sign.dtype)
        voters = jnp.maximum(agrees.sum(0), 1).astype(sign.dtype)
        return jnp.where(agrees, weighted, 0).sum(0) / voters

    def pruned(self, x: Float[Array, "s m n"], number: int, part: str) -> Float[Array, "s m n"]:
        if not self.kind.prune or self.density >= 1:
            return x
        if self.kind.prune == "random":
            assert self.key is not None
            kept = keep_mask(self.key, number, part, self.density, x.shape)
            return jnp.where(kept, x, 0) / self.density
        flat = x.reshape(len(x), -1)
        _, largest = lax.top_k(jnp.abs(flat), int(self.density * flat.shape[1]))
        kept = jax.vmap(lambda row, at: jnp.zeros_like(row).at[at].set(row[at]))(flat, largest)
        return kept.reshape(x.shape)


def clamped(pair: Factors, quantile: float | None) -> Factors:
    """Return A and B within plus and minus this quantile of all their values, if there is one."""
    if quantile is None:
        return pair
    a, b = pair
    both = jnp.concatenate([a.reshape(len(a), -1), b.reshape(len(b), -1)], axis=1)
    high = jnp.quantile(both, quantile, axis=1)[:, None, None]
    return jnp.clip(a, -high, high), jnp.clip(b, -high, high)


def _problems(
    adapters: Sequence[Adapters],
    weights: Sequence[float],
    name: str,
    svd_rank: int | None,
    density: float | None,
    sign_method: str,
    key: object,
) -> list[str]:
    kind = COMBINATIONS.get(name)
    found = []
    if not any(map(len, adapters)):
        found.append("adapters: got none")
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        found.append(f"weights: got {list(weights)}, wanted {len(adapters)} finite numbers")
    if kind is None and name != CAT:
        wanted = ", ".join(sorted([CAT, *COMBINATIONS]))
        found.append(f"combination_type: got {name!r}, wanted one of {wanted}")
    if svd_rank is not None and svd_rank < 1:
        found.append(f"svd_rank: got {svd_rank}, wanted at least 1")
    if sign_method not in SIGN_METHODS:
        found.append(f"majority_sign_method: got {sign_method!r}, wanted one of {SIGN_METHODS}")
    if kind is not None and kind.prune and (density is None or not 0 < density <= 1):
        found.append(f"density: got {density}, wanted 0 < density <= 1 for {name!r}")
    if kind is not None and kind.prune == "random" and key is None:
        found.append(f"key: got None, wanted a random key for {name!r}")
    mixed = kind is not None and not kind.on_delta
    return found + misfits(adapters, same_rank=mixed)
