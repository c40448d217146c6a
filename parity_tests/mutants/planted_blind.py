"""Bugs thought up from the source alone, without a look at the tests or at the planted table.

How many of them the default tests found before any test was written for them says what the suite
finds of bugs that nobody had in mind: 11 of the 20 of ``SECOND``, and 12 of the 19 of ``THIRD``.
Since then each has its test, as those of the table.
"""

from __future__ import annotations

from parity_tests.mutants.planted import rows

SECOND = (
    *rows(
        "low-rank products",
        (
            "the groups of a convolution mix A's columns",
            "core/contractions.py",
            "a = jnp.tile(a, (1,) * r + (groups,)) if groups > 1 else a",
            "a = jnp.repeat(a, groups, axis=-1) if groups > 1 else a",
            "laws/test_values_by_hand.py::test_every_group_of_a_convolution_sees_all_of_a_and_columns_of_b_of_its_own",
        ),
    ),
    *rows(
        "rewriter",
        (
            "a plain weight joined with DoRA's has the gain 0",
            "rewrite/weight_moves.py",
            '_ABSENT = {"gain": 1.0, "bias": 0.0}',
            '_ABSENT = {"gain": 0.0, "bias": 0.0}',
            "laws/test_values_by_hand.py::test_a_plain_weight_beside_doras_keeps_its_output",
        ),
    ),
    *rows(
        "configuration",
        (
            "the base counts a weight once for each of its slices",
            "rewrite/planning/plan.py",
            "return sum(map(math.prod, shapes.values()))",
            "return sum(math.prod(leaf.shape) for leaf in self.leaves)",
            "laws/test_values_by_hand.py::test_a_weight_counts_once_however_many_of_its_ranges_are_adapted",
        ),
        (
            "the slices of a weight draw the same A",
            "rewrite/planning/plan.py",
            "own = self.config.init_lora_weights, fold_in_path(key, leaf.name)",
            "own = self.config.init_lora_weights, fold_in_path(key, leaf.path)",
            "laws/test_structure_by_hand.py::test_every_path_and_every_range_of_a_weight_draws_its_own_a",
        ),
    ),
    *rows(
        "configuration",
        (
            "layers_to_transform stays the sequence that it was given as",
            "core/config/lora_config.py",
            '    "layers_to_transform",\n    "layers_pattern",\n    "on_unsupported",',
            '    "layers_pattern",\n    "on_unsupported",',
            "peft/test_peft_matching.py::test_layers_are_chosen_as_in_peft",
        ),
    ),
    *rows(
        "files",
        (
            "a scale that is off by a few percent is saved",
            "peft/tensors.py",
            "np.allclose(entry.scale, leaf.scale, rtol=1e-6, atol=0)",
            "np.allclose(entry.scale, leaf.scale, rtol=5e-2, atol=0)",
            "peft/test_files_by_hand.py::test_no_adapter_of_another_scale_is_saved",
        ),
        (
            "names of checkpointed modules are not read",
            "peft/spellings.py",
            "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module",
            "_orig_mod|_fsdp_wrapped_module",
            "peft/test_foreign_spellings.py::test_every_spelling_reads_as_pefts_own",
        ),
        (
            "a converted adapter loses its rank stabilisation",
            "peft/foreign/older_layouts.py",
            "alpha = lora_config.scale(config, wanted, given) * r",
            "alpha = given",
            "cli/test_convert.py::test_a_directory_without_the_prefix_keeps_its_configurations_scales",
        ),
    ),
    *rows(
        "files",
        (
            "a table that numbers layers by _{layer} is not stacked",
            "peft/names/naming.py",
            'jax.replace(f".{own}", "").replace(f"_{own}", "")',
            'jax.replace(f".{own}", "")',
            "peft/test_files_by_hand.py::test_a_table_of_numbered_layers_is_that_of_stacked_ones",
        ),
    ),
    *rows(
        "merging",
        (
            "a bias that trained in full is lost where an adapter's is merged",
            "adapters/merge.py",
            "bias: Any = changed.get(own[name], leaves[own[name]])",
            "bias: Any = leaves[own[name]]",
            "laws/test_lora_bias.py::test_merging_rounds_once_adds_to_a_bias_trained_in_full_and_reports_it",
        ),
        (
            "DARE drops the same values of every adapter",
            "adapters/combine.py",
            "own = fold_in_path(jax.random.fold_in(key, number), part)",
            "own = fold_in_path(key, part)",
            "adapters/test_combining.py::test_dare_keeps_the_share_and_the_mean",
        ),
    ),
    *rows(
        "initialisations",
        (
            "whitened EVA divides by S for its root",
            "adapters/inits/activations.py",
            "jnp.maximum(squares[::-1][:r], 0) ** 0.25",
            "jnp.maximum(squares[::-1][:r], 0) ** 0.5",
            "laws/test_values_by_hand.py::test_a_whitened_direction_is_over_the_root_of_its_singular_value",
        ),
    ),
    *rows(
        "optimizers",
        (
            "the scales of stacked norms decay",
            "optim/optimizers.py",
            'vector = leaf.ndim < 2 or name in paths.BIAS_NAMES or name == "scale"',
            "vector = leaf.ndim < 2 or name in paths.BIAS_NAMES",
            "laws/test_values_by_hand.py::test_no_scale_of_a_norm_decays_under_loraplus",
        ),
        (
            "rows that fill a chunk of the loss have the default label",
            "optim/losses.py",
            "constant_values=how.ignore_index)",
            "constant_values=-100)",
            "laws/test_values_by_hand.py::test_tokens_that_fill_a_chunk_of_the_loss_do_not_count",
        ),
    ),
    *rows(
        "finetune",
        (
            "fine-tuning draws the same adapters for every seed",
            "train/finetune.py",
            "adapters=plan.init(jax.random.key(options.seed)),",
            "adapters=plan.init(jax.random.key(0)),",
            "train/test_finetune_options.py::test_the_seed_decides_the_start_and_not_the_parts",
        ),
    ),
    *rows(
        "commands",
        (
            "rows of different tokens are compared",
            "cli/diff.py",
            "if one.indices != other.indices:",
            "if len(one.indices) != len(other.indices):",
            "peft/test_files_by_hand.py::test_rows_of_different_tokens_are_not_compared",
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
            "laws/test_values_by_hand.py::test_zeros_of_different_signs_are_not_exact",
        ),
    ),
    *rows(
        "layers",
        (
            "rngs given at the call of an nnx layer are not used",
            "nnx/layers.py",
            'stream = layer.rngs if rngs is None else rngs["dropout"]',
            "stream = layer.rngs",
            "laws/test_layers.py::test_dropout_zeroes_and_scales_the_elements_of_x",
        ),
    ),
    *rows(
        "finetune",
        (
            "a row without tokens is packed as padding",
            "models/packing.py",
            "mask = np.where(np.any(mask, axis=1, keepdims=True), mask, 1)",
            "mask = np.asarray(mask)",
            "laws/test_packing.py::test_every_token_has_one_place_and_few_shapes_occur",
        ),
    ),
    *rows(
        "many adapters",
        (
            "a traced index beyond the stack has zeros for full leaves",
            "adapters/stack.py",
            "present = (index >= 0) & (index < size)",
            "present = index >= 0",
            "laws/test_values_by_hand.py::test_a_traced_index_beyond_the_stack_is_no_adapter",
        ),
    ),
)

THIRD = (
    *rows(
        "low-rank products",
        (
            "groups of rows read B's rank where A has it",
            "core/contractions.py",
            "rank_axis = 1 if kept == OUT else up.ndim - 1",
            "rank_axis = 1",
            "laws/test_values_by_hand.py::test_groups_of_rows_meet_a_stack_either_way_round",
        ),
    ),
    *rows(
        "rewriter",
        (
            "a bias does not follow the heads of a transposed weight",
            "rewrite/weight_moves.py",
            "bias=None if weight.bias is None else follow(weight.bias, OUT, rank_axis),",
            "bias=weight.bias,",
            "laws/test_values_by_hand.py::test_a_bias_follows_the_axes_of_its_weight",
        ),
        (
            "adapters of different dtypes are not brought together in a sum",
            "rewrite/weight_moves.py",
            "alike(list(weights), base.dtype)",
            "list(weights)",
            "laws/test_complex.py::test_merging_holds_for_every_complex_use",
        ),
    ),
    *rows(
        "configuration",
        (
            "leaves trained in full are the model's own arrays",
            "rewrite/planning/plan.py",
            "path: Full(jnp.array(value, copy=True))",
            "path: Full(jnp.asarray(value))",
            "adapters/test_buffers.py::test_either_may_be_donated",
        ),
        (
            "exclude_modules may name nothing",
            "rewrite/planning/select.py",
            '            yield "exclude_modules", name\n',
            "            yield from ()\n",
            "peft/test_unmatched.py::test_names_of_a_file_that_mean_nothing_here_are_one_warning",
        ),
        (
            "a key of trainable_token_indices begins at a dot",
            "core/config/lora_config.py",
            "in given.items() if module.endswith(name)]",
            "in given.items() if _ends_with(module, name)]",
            "peft/test_tokens.py::test_a_name_means_every_weight_that_ends_so",
        ),
    ),
    *rows(
        "files",
        (
            "PEFT looks up target modules beside target_parameters",
            "peft/config_json.py",
            '[] if own["target_modules"] is None else own["target_modules"]',
            'own["target_modules"]',
            "peft/test_experts.py::test_a_file_without_modules_says_so",
        ),
        (
            "a magnitude without use_dora is dropped",
            "peft/module_tensors.py",
            'if "magnitude" in parts and not dora:',
            'if "magnitude" in parts and dora and not dora:',
            "peft/test_files_by_hand.py::test_a_magnitude_that_the_configuration_does_not_know_is_refused",
        ),
        (
            "two rows of a table may give one name",
            "peft/names/naming.py",
            "            if part in seen:\n",
            "            if part in seen and lone:\n",
            "peft/test_naming.py::test_rows_that_do_not_work_are_all_listed",
        ),
    ),
    *rows(
        "merging",
        (
            "without_dora does not hear of the rank",
            "adapters/extract.py",
            "rank(one) if r is None else r)",
            "rank(one))",
            "laws/test_values_by_hand.py::test_plain_lora_in_doras_place_has_the_rank_that_is_asked_for",
        ),
        (
            "what resize leaves alone is the old array",
            "adapters/resize.py",
            "return apart(resized, adapters), errors",
            "return resized, errors",
            "adapters/test_buffers.py::test_either_may_be_donated",
        ),
    ),
    *rows(
        "initialisations",
        (
            "EVA's rank of a module is that of one whose name ends alike",
            "adapters/inits/eva_ranks.py",
            "any(lora_config.hits(one, m) for one in own)]",
            "False]",
            "laws/test_values_by_hand.py::test_ranks_of_modules_whose_names_end_alike_are_each_ones_own",
        ),
    ),
    *rows(
        "optimizers",
        (
            "embeddings are preconditioned, too",
            "optim/optimizers.py",
            "return gradient if path in embeddings else _preconditioned(gradient, adapter, reg)",
            "return _preconditioned(gradient, adapter, reg)",
            "train/test_optimizers.py::test_twenty_steps_are_pefts",
        ),
        (
            "a negative label is the first of the vocabulary",
            "optim/losses.py",
            "ignored | ((labels >= 0) & (labels < vocabulary))",
            "ignored | (labels < vocabulary)",
            "train/test_losses.py::test_an_unknown_label_makes_the_loss_nan",
        ),
    ),
    *rows(
        "finetune",
        (
            "the same accuracy with a lower loss is not better",
            "train/loop.py",
            "if (score.accuracy, -score.loss) > self.best:",
            "if score.accuracy > self.best[0]:",
            "train/test_train.py::test_early_stopping_keeps_the_best_adapters",
        ),
    ),
    *rows(
        "commands",
        (
            "adapters of different invocations are combined",
            "cli/combine.py",
            "    _refuse_other_tokens(opened, options.adapters)\n",
            "",
            "peft/test_files_by_hand.py::test_adapters_of_different_invocations_are_not_combined",
        ),
    ),
    *rows(
        "layers",
        (
            "an adapter that no layer uses is not told",
            "linen/layers.py",
            "for path in sorted(leaves.keys() - wanted)]",
            "for path in ()]",
            "laws/test_layers_by_hand.py::test_an_adapter_that_no_layer_uses_is_told",
        ),
    ),
    *rows(
        "finetune",
        (
            "a batch of packed rows may have five shapes",
            "models/packing.py",
            "quarter = -(-mask.size // QUARTERS)",
            "quarter = max(mask.size // QUARTERS, 1)",
            "laws/test_packing.py::test_every_token_has_one_place_and_few_shapes_occur",
        ),
    ),
    *rows(
        "many adapters",
        (
            "an aLoRA is stacked with an adapter that acts everywhere",
            "adapters/stack.py",
            '        "masked": entry.masked,\n        "columns": entry.columns,',
            '        "columns": entry.columns,',
            "laws/test_values_by_hand.py::test_an_alora_is_not_stacked_with_an_adapter_that_acts_everywhere",
        ),
    ),
)
