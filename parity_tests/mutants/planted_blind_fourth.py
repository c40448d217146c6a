"""The fourth blind count: 14 of 20 were found before any test was written for them.

Each ran with the default tests of its own area, so that a whole run may have found more.
Since then each has its test.
"""

from __future__ import annotations

from parity_tests.mutants.planted import rows

FOURTH = (
    *rows(
        "optimizers",
        (
            "LoRA+ decays vectors",
            "optim/optimizers.py",
            '"vector": optimizer(fast, 0.0)',
            '"vector": optimizer(fast, weight_decay)',
            "train/test_optimizers.py::test_twenty_steps_are_pefts",
        ),
        (
            "LoRA+ trains embeddings at the rate of A",
            "optim/optimizers.py",
            '"embedding": optimizer(embedding_learning_rate, weight_decay)',
            '"embedding": optimizer(learning_rate, weight_decay)',
            "train/test_optimizers.py::test_twenty_steps_are_pefts",
        ),
    ),
    *rows(
        "merging",
        (
            "a rank of 0 is resized to",
            "adapters/resize.py",
            "for path, n in wanted.items() if n < 1]",
            "for path, n in wanted.items() if n < 0]",
            "adapters/test_algebra.py::test_what_does_not_go_is_listed_at_once",
        ),
        (
            "what a larger rank adds is alike for all paths",
            "adapters/resize.py",
            "None if key is None else fold_in_path(key, path))",
            "key)",
            "adapters/test_algebra.py::test_what_a_larger_rank_adds_is_drawn_anew_for_every_path",
        ),
        (
            "svd combines to the rank of the first path",
            "adapters/combine.py",
            "r = svd_rank or max(rank(one) for tree in trees for one in tree.values())",
            "r = svd_rank or next(rank(one) for tree in trees for one in tree.values())",
            "adapters/test_combining.py::test_every_type_gives_pefts_deltas",
        ),
        (
            "DARE keeps the same values of every adapter",
            "adapters/combine.py",
            "own = fold_in_path(jax.random.fold_in(key, number), part)",
            "own = fold_in_path(key, part)",
            "adapters/test_combining.py::test_dare_keeps_the_share_and_the_mean",
        ),
        (
            "extract tells of no other change",
            "adapters/extract.py",
            "            errors[path] = 1.0\n",
            "            errors[path] = 0.0\n",
            "adapters/test_algebra.py::test_a_plan_decides_ranks_scales_and_columns_of_what_is_extracted",
        ),
        (
            "plain LoRA in DoRA's place has the dtype of the SVD",
            "adapters/extract.py",
            "            a, b = a.astype(one.a.dtype), b.astype(one.b.dtype)\n",
            "",
            "laws/test_values_by_hand.py::test_plain_lora_in_doras_place_has_the_dtype_of_the_pair",
        ),
    ),
    *rows(
        "many adapters",
        (
            "unstack leaves the padded rank",
            "adapters/stack.py",
            "return replace(_with_rank(one, ranks[path][k]), scale=scale)",
            "return replace(one, scale=scale)",
            "adapters/test_many.py::test_unstack_undoes_stack",
        ),
    ),
    *rows(
        "optimizers",
        (
            "a label smoothing above 1 passes",
            "optim/losses.py",
            "if not 0 <= label_smoothing <= 1:",
            "if not 0 <= label_smoothing:",
            "train/test_losses.py::test_what_does_not_fit_is_said_all_at_once",
        ),
        (
            "the loss divides by all tokens",
            "optim/losses.py",
            "count = jnp.sum(labels != how.ignore_index).astype(total.dtype)",
            "count = jnp.asarray(labels.size, total.dtype)",
            "train/test_losses.py::test_smoothed_values_and_every_gradient_are_pytorchs",
        ),
    ),
    *rows(
        "aLoRA",
        (
            "aLoRA acts from the first invocation",
            "core/alora.py",
            "last = jnp.max(jnp.where(found, jnp.arange(starts), -1), axis=-1, keepdims=True)",
            "last = jnp.min(jnp.where(found, jnp.arange(starts), tokens), axis=-1, keepdims=True)",
            "laws/test_alora.py::test_the_mask_is_pefts",
        ),
    ),
    *rows(
        "files",
        (
            "MLX's scale is read as alpha",
            "peft/foreign/mlx.py",
            "module: (r, float(scale) * r if lora_alpha",
            "module: (r, float(scale) if lora_alpha",
            "cli/test_convert_foreign.py::test_an_mlx_adapter_gives_peft_the_logits_that_mlx_has",
        ),
        (
            "a tied copy that differs is dropped",
            "peft/tying.py",
            "if copy in tensors and np.array_equal(tensors[copy], value)",
            "if copy in tensors",
            "peft/test_tying.py::test_the_heads_copies_must_be_the_embeddings",
        ),
    ),
    *rows(
        "commands",
        (
            "lora_bias of another shape than the stored bias passes",
            "cli/stored_weights.py",
            "elif shape != one.bias.shape or dtype not in _FLOATS:",
            "elif dtype not in _FLOATS:",
            "cli/test_merge_files.py::test_lora_bias_is_merged_into_the_stored_bias",
        ),
        (
            "a square Conv1D follows no other weight",
            "cli/stored_weights.py",
            "square = told.pop() if len(told) == 1 else (LOOKED_UP if transposed else LINEAR)",
            "square = LOOKED_UP if transposed else LINEAR",
            "cli/test_merge_files.py::test_a_square_conv1d_lies_as_the_others_of_its_adapter_do",
        ),
        (
            "diff calls adapters of different scales equal",
            "cli/diff.py",
            "    same = one.scale == other.scale and all(",
            "    same = all(",
            "peft/test_files_by_hand.py::test_adapters_that_differ_in_their_scale_alone_differ",
        ),
    ),
    *rows(
        "finetune",
        (
            "balance draws by no seed",
            "train/data.py",
            "    rng = np.random.default_rng(seed)\n    kept = [",
            "    rng = np.random.default_rng(0)\n    kept = [",
            "train/test_finetune_options.py::test_balance_cuts_the_larger_class",
        ),
        (
            "contradictions counts rows",
            "train/data.py",
            "return len(np.unique(first[data.labels != data.labels[first]]))",
            "return len(first[data.labels != data.labels[first]])",
            "train/test_data.py::test_a_text_with_several_labels_counts_once_however_often_it_stands_there",
        ),
    ),
    *rows(
        "layers",
        (
            "from_linear shares no variable",
            "nnx/layers.py",
            "        layer.kernel, layer.bias = kernel, bias\n",
            "",
            "laws/test_layer_models.py::test_from_linear_shares_the_variables",
        ),
    ),
)
