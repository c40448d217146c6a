"""Bugs thought up from the source alone, without a look at the tests or at the planted table.

How many of them the default tests found before any test was written for them says what the suite
finds of bugs that nobody had in mind. Since then each has its test, as those of the table.
"""

from __future__ import annotations

from parity_tests.planted import rows

SECOND = (
    *rows(
        "low-rank arithmetic",
        (
            "the groups of a convolution mix A's columns",
            "contractions.py",
            "a = jnp.tile(a, (1,) * r + (groups,)) if groups > 1 else a",
            "a = jnp.repeat(a, groups, axis=-1) if groups > 1 else a",
            "",
        ),
    ),
    *rows(
        "rewrite rules",
        (
            "a plain weight joined with DoRA's has the gain 0",
            "rewrite/moves.py",
            '_ABSENT = {"gain": 1.0, "bias": 0.0}',
            '_ABSENT = {"gain": 0.0, "bias": 0.0}',
            "",
        ),
    ),
    *rows(
        "plan",
        (
            "the base counts a weight once for each of its slices",
            "rewrite/plan.py",
            "return sum(map(math.prod, shapes.values()))",
            "return sum(math.prod(leaf.shape) for leaf in self.leaves)",
            "",
        ),
        (
            "the slices of a weight draw the same A",
            "rewrite/plan.py",
            "own = self.config.init_lora_weights, fold_in_path(key, leaf.name)",
            "own = self.config.init_lora_weights, fold_in_path(key, leaf.path)",
            "",
        ),
    ),
    *rows(
        "config",
        (
            "layers_to_transform stays the sequence that it was given as",
            "config.py",
            '    "layers_to_transform",\n    "layers_pattern",\n    "on_unsupported",',
            '    "layers_pattern",\n    "on_unsupported",',
            "",
        ),
    ),
    *rows(
        "files",
        (
            "a scale that is off by a few percent is saved",
            "peft/tensors.py",
            "np.allclose(entry.scale, leaf.scale, rtol=1e-6, atol=0)",
            "np.allclose(entry.scale, leaf.scale, rtol=5e-2, atol=0)",
            "",
        ),
        (
            "names of checkpointed modules are not read",
            "peft/spelling.py",
            "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module",
            "_orig_mod|_fsdp_wrapped_module",
            "",
        ),
        (
            "a converted adapter loses its rank stabilisation",
            "peft/layouts.py",
            "alpha = configs.scale(config, wanted, given) * r",
            "alpha = given",
            "",
        ),
    ),
    *rows(
        "naming",
        (
            "a table that numbers layers by _{layer} is not stacked",
            "naming.py",
            'jax.replace(f".{own}", "").replace(f"_{own}", "")',
            'jax.replace(f".{own}", "")',
            "",
        ),
    ),
    *rows(
        "merging",
        (
            "a bias that trained in full is lost where an adapter's is merged",
            "merging.py",
            "bias: Any = changed.get(own[name], leaves[own[name]])",
            "bias: Any = leaves[own[name]]",
            "",
        ),
        (
            "DARE drops the same values of every adapter",
            "combining.py",
            "own = fold_in_path(jax.random.fold_in(key, number), part)",
            "own = fold_in_path(key, part)",
            "",
        ),
    ),
    *rows(
        "inits",
        (
            "whitened EVA divides by S for its root",
            "inits/activations.py",
            "jnp.maximum(squares[::-1][:r], 0) ** 0.25",
            "jnp.maximum(squares[::-1][:r], 0) ** 0.5",
            "",
        ),
    ),
    *rows(
        "optimizers",
        (
            "the scales of stacked norms decay",
            "optimizers.py",
            'vector = leaf.ndim < 2 or name in paths.BIAS_NAMES or name == "scale"',
            "vector = leaf.ndim < 2 or name in paths.BIAS_NAMES",
            "",
        ),
        (
            "rows that fill a chunk of the loss have the default label",
            "losses.py",
            "constant_values=how.ignore_index)",
            "constant_values=-100)",
            "",
        ),
    ),
    *rows(
        "training",
        (
            "fine-tuning draws the same adapters for every seed",
            "train/finetune.py",
            "adapters=plan.init(jax.random.key(options.seed)),",
            "adapters=plan.init(jax.random.key(0)),",
            "",
        ),
    ),
    *rows(
        "commands",
        (
            "rows of different tokens are compared",
            "commands/diff.py",
            "if one.indices != other.indices:",
            "if len(one.indices) != len(other.indices):",
            "",
        ),
    ),
    *rows(
        "parity",
        (
            "zeros of different signs are exact",
            "parity/verdicts.py",
            "return bool(np.array_equal(one, two) and np.array_equal(np.signbit(one), "
            "np.signbit(two)))",
            "return bool(np.array_equal(one, two))",
            "",
        ),
    ),
    *rows(
        "layers",
        (
            "rngs given at the call of an nnx layer are not used",
            "nnx/layers.py",
            'stream = layer.rngs if rngs is None else rngs["dropout"]',
            "stream = layer.rngs",
            "",
        ),
    ),
    *rows(
        "packing",
        (
            "a row without tokens is packed as padding",
            "packing.py",
            "mask = np.where(np.any(mask, axis=1, keepdims=True), mask, 1)",
            "mask = np.asarray(mask)",
            "",
        ),
    ),
    *rows(
        "many",
        (
            "a traced index beyond the stack has zeros for full leaves",
            "many.py",
            "present = (index >= 0) & (index < size)",
            "present = index >= 0",
            "",
        ),
    ),
)
