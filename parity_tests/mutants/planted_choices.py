"""Planted bugs of what is adapted, how it begins, and how it is kept and judged."""

from parity_tests.mutants.planted import rows

CONFIGURATION = rows(
    "configuration",
    (
        "the first group of layers_pattern is the layer",
        "core/config/lora_config.py",
        "int(found[found.re.groups])",
        "int(found[1])",
        "peft/test_peft_matching.py::test_a_group_in_layers_pattern_is_not_the_layer",
    ),
    (
        "a suffix may begin within a name",
        "core/config/lora_config.py",
        'module == name or module.endswith(f".{name}")',
        "module.endswith(name)",
        "peft/test_peft_matching.py::test_every_module_is_matched_by_every_pattern_as_in_peft",
    ),
    (
        "an expression need not reach the end",
        "core/config/lora_config.py",
        "re.fullmatch(names, module)",
        "re.match(names, module)",
        "peft/test_peft_matching.py::test_every_module_is_matched_by_every_pattern_as_in_peft",
    ),
    (
        "excluded modules are adapted",
        "rewrite/planning/select.py",
        "for path in named - excluded - saved",
        "for path in named - saved",
        "laws/test_plan.py::test_targets_by_suffix_regex_and_all_linear",
    ),
    (
        "all-linear means the output head, too",
        "rewrite/planning/select.py",
        'return "output head" if head else _other_kind(path, record)',
        "return _other_kind(path, record)",
        "laws/test_plan.py::test_targets_by_suffix_regex_and_all_linear",
    ),
    (
        "lora_only means all biases",
        "rewrite/planning/select.py",
        '(config.bias == "lora_only" and module in modules)',
        'config.bias == "lora_only"',
        "laws/test_values_by_hand.py::test_lora_only_trains_the_biases_of_adapted_modules_alone",
    ),
    (
        "the scale is of the configuration's r where a pattern has another",
        "rewrite/planning/plan.py",
        "scale=lora_config.scale(config, r, alpha)",
        "scale=lora_config.scale(config, config.r, alpha)",
        "laws/test_plan.py::test_scale_rank_patterns_and_totals",
    ),
    (
        "the first layer is not a choice",
        "core/config/lora_config.py",
        "if wanted is None or wanted == ():",
        "if not wanted:",
        "peft/test_peft_matching.py::test_the_first_layer_may_be_chosen",
    ),
    (
        "what lies in a saved module is not trained",
        "core/config/lora_config.py",
        'owners = (".".join(parts[: n + 1]) for n in range(len(parts)))',
        "owners = [module]",
        "laws/test_structure_by_hand.py::test_all_that_lies_in_a_saved_module_is_trained",
    ),
    (
        "every path draws the same A",
        "rewrite/planning/plan.py",
        "init, own = self.config.init_lora_weights, fold_in_path(key, leaf.name)",
        "init, own = self.config.init_lora_weights, key",
        (
            "laws/test_structure_by_hand.py::test_every_path_and_every_range_of_a_weight_draws_its_own_a"
        ),
    ),
    (
        "ranges of one weight draw the same A",
        "rewrite/planning/plan.py",
        "init, own = self.config.init_lora_weights, fold_in_path(key, leaf.name)",
        "init, own = self.config.init_lora_weights, fold_in_path(key, leaf.path)",
        (
            "laws/test_structure_by_hand.py::test_every_path_and_every_range_of_a_weight_draws_its_own_a"
        ),
    ),
    (
        "bfloat16 models get bfloat16 adapters",
        "rewrite/planning/plan.py",
        "DTypeLike = jnp.float32, *, params: Any = None",
        "DTypeLike = jnp.bfloat16, *, params: Any = None",
        (
            "laws/test_structure_by_hand.py::test_adapters_are_float32_beside_any_base_and_an_em"
            "beddings_a_is_zero"
        ),
    ),
)

INITIALISATIONS = rows(
    "initialisations",
    (
        "gaussian is not divided by r",
        "core/initializers.py",
        "(stacked, fan_in, r), jnp.float32) / r, jnp.zeros(",
        "(stacked, fan_in, r), jnp.float32), jnp.zeros(",
        "laws/test_values_by_hand.py::test_gaussian_has_a_deviation_of_one_over_r",
    ),
    (
        "orthogonal is none",
        "core/initializers.py",
        "left @ q[:, 0::2] / 10",
        "left @ q[:, 1::2] / 10",
        "laws/test_core.py::test_orthogonal_changes_nothing_but_moves",
    ),
    (
        "an embedding's A is random and B is 0",
        "core/initializers.py",
        "return jnp.zeros((stacked, fan_in, r), jnp.float32), b\n\n\ndef embedding_both",
        "return jnp.ones((stacked, fan_in, r), jnp.float32), 0 * b\n\n\ndef embedding_both",
        (
            "laws/test_structure_by_hand.py::test_adapters_are_float32_beside_any_base_and_an_em"
            "beddings_a_is_zero"
        ),
    ),
    (
        "PiSSA under DoRA takes the original weight's norm",
        "adapters/inits/initialise.py",
        "delta.dora_norm(changed.get(leaf.path, leaves[leaf.path]), adapter)",
        "delta.dora_norm(leaves[leaf.path], adapter)",
        (
            "adapters/test_inits_combined.py::test_dora_adds_the_norms_of_what_the_weights_are_at_the_start"
        ),
    ),
    (
        "LoRA-GA sums gradients",
        "adapters/inits/gradients.py",
        "leaf / count",
        "leaf",
        "adapters/test_inits_gradients.py::test_a_b_and_the_base_are_pefts",
    ),
    (
        "LoRA-GA's stable scale is by the inputs",
        "adapters/inits/gradients.py",
        "w.shape[1] ** 0.25",
        "w.shape[0] ** 0.25",
        "adapters/test_inits_gradients.py::test_a_b_and_the_base_are_pefts",
    ),
    (
        "EVA takes the smallest directions",
        "adapters/inits/activations.py",
        "a = v[:, ::-1][:, :r]",
        "a = v[:, :r]",
        "adapters/test_inits.py::test_a_b_and_the_base_are_pefts",
    ),
    (
        "EVA's covariance is about 0",
        "adapters/inits/activations.py",
        "gram - count * jnp.outer(mean, mean)",
        "gram",
        "adapters/test_inits.py::test_a_b_and_the_base_are_pefts",
    ),
    (
        "PiSSA does not divide by the scale",
        "adapters/inits/weights.py",
        "root = jnp.sqrt(s[:r] / scale)",
        "root = jnp.sqrt(s[:r])",
        "adapters/test_inits.py::test_a_b_and_the_base_are_pefts",
    ),
    (
        "LoftQ's second round forgets the scale",
        "adapters/inits/loftq.py",
        "rest = w - scale * (pair[0] @ pair[1])",
        "rest = w - pair[0] @ pair[1]",
        "adapters/test_loftq.py::test_loftq_alternates_between_rounding_and_the_best_low_rank",
    ),
    (
        "relative_to adds the start",
        "adapters/inits/relative.py",
        "-first.b.astype(now.b.dtype)",
        "first.b.astype(now.b.dtype)",
        (
            "adapters/test_inits.py::test_outputs_stay_and_peft_serves_what_was_trained_on_the_origi"
            "nal_weights"
        ),
    ),
    (
        "CorDA's two methods are exchanged",
        "adapters/inits/activations.py",
        'if method == "ipm" else',
        'if method == "kpm" else',
        "adapters/test_inits.py::test_a_b_and_the_base_are_pefts",
    ),
    (
        "the base of OLoRA stays",
        "adapters/inits/initialise.py",
        "taken_out = replace(adapter, scale=-leaf.scale)",
        "taken_out = replace(adapter, scale=0.0)",
        "adapters/test_inits.py::test_a_b_and_the_base_are_pefts",
    ),
)

FILES = rows(
    "files",
    (
        "other fields of a file are lost",
        "peft/config_json.py",
        "DEFAULTS | dict(file.other) | own | recorded",
        "DEFAULTS | own | recorded",
        "peft/test_strict_files.py::test_newer_fields_are_kept_with_a_warning_and_come_back",
    ),
    (
        "the task type is lost",
        "peft/config_json.py",
        '"task_type": file.task_type',
        '"task_type": None',
        "train/test_finetune_options.py::test_another_model_is_trained_and_recorded",
    ),
    (
        "NaN is loaded",
        "peft/tensors.py",
        "None if is_finite(tensor) else",
        "None if True else",
        "peft/test_files_by_hand.py::test_no_value_that_is_not_finite_is_loaded",
    ),
    (
        "an embedding trained in full is written turned",
        "peft/keys.py",
        "matrix = [*in_, *out] if leaf.looked_up else [*out, *in_]",
        "matrix = [*out, *in_]",
        "peft/test_whole_modules.py::test_embeddings_stay_as_they_are_and_kernels_are_turned",
    ),
)

WRITING = rows(
    "writing",
    (
        "what was written is not synced",
        "core/io/journal.py",
        "os.fsync(handle)\n    finally:\n        os.close(handle)\n\n\ndef _sync_directory",
        ("handle.bit_length()\n    finally:\n        os.close(handle)\n\n\ndef _sync_directory"),
        "cli/test_cli.py::test_a_full_disk_at_the_end",
    ),
    (
        "what a failure moved away is not put back",
        "core/io/journal.py",
        "                    self._back(names, error)",
        "                    names.clear()",
        "cli/test_file_commands.py::test_a_full_disk_in_the_middle_leaves_nothing",
    ),
    (
        "a working directory stays behind",
        "core/io/journal.py",
        "            path.rmdir()\n    finally",
        "            path.exists()\n    finally",
        "cli/test_file_commands.py::test_shards_are_merged_in_place_of_the_old_ones",
    ),
    (
        "an occupied directory is taken",
        "core/io/atomic_files.py",
        "if occupied and not overwrite:",
        "if occupied and overwrite is None:",
        "cli/test_cli.py::test_an_occupied_output_is_refused_and_never_cleared",
    ),
)

PARITY = rows(
    "parity",
    (
        "CHAIN is ten times as large",
        "parity/compare.py",
        "CHAIN = 32.0",
        "CHAIN = 320.0",
        "parity/test_constants.py::test_a_tensor_of_a_port_may_be_behind_32_roundings",
    ),
    (
        "the gate's CHAIN is ten times as large",
        "parity/mutants/holding.py",
        "CHAIN = 32.0",
        "CHAIN = 320.0",
        "parity/test_constants.py::test_the_suites_hold_a_tensor_to_32_roundings_too",
    ),
    (
        "the models' CHAIN is ten times as large",
        "parity/suite/models.py",
        "CHAIN = 32.0",
        "CHAIN = 320.0",
        "parity/test_constants.py::test_the_suites_hold_a_tensor_to_32_roundings_too",
    ),
    (
        "NaN of one side of a trajectory is order",
        "parity/training/trajectories.py",
        "if not d <= self.factor * b",
        "if d > self.factor * b",
        "parity/test_constants.py::test_a_side_that_is_not_finite_leaves_the_band_there",
    ),
    (
        "the band is ten times as wide",
        "parity/training/trajectories.py",
        "FACTOR = 2.0",
        "FACTOR = 20.0",
        "parity/test_constants.py::test_jax_may_be_twice_the_noise_away",
    ),
    (
        "only the first seed makes the band",
        "parity/training/trajectories.py",
        "for one in flat[2 : 2 + seeds])",
        "for one in flat[2:3])",
        "parity/test_constants.py::test_the_band_is_the_widest_of_the_seeds",
    ),
    (
        "NaN of JAX is within the bound",
        "parity/verdicts.py",
        "if not found.jax <= found.bound",
        "if found.jax > found.bound",
        "parity/test_constants.py::test_one_side_that_is_not_finite_is_a_mismatch",
    ),
    (
        "a bias is one of 80 deviations",
        "parity/verdicts.py",
        "SLOPE_LIMIT = 8.0",
        "SLOPE_LIMIT = 80.0",
        (
            "parity/test_constants.py::test_a_common_factor_may_be_eight_deviations_of_what"
            "_rounding_leaves"
        ),
    ),
    (
        "PyTorch may be 40 roundings away",
        "parity/verdicts.py",
        "REFERENCE_LIMIT = 4.0",
        "REFERENCE_LIMIT = 40.0",
        "parity/test_constants.py::test_torch_may_be_four_roundings_away",
    ),
    (
        "float64 runs agree to 1e-8",
        "parity/compare.py",
        "AGREEMENT = 1e-10",
        "AGREEMENT = 1e-8",
        ("parity/test_constants.py::test_float64_runs_that_agree_to_1e_10_are_one_function"),
    ),
    (
        "a loss that stands still proves something",
        "parity/training/trajectories.py",
        "SMALLEST_MOVE = 1e-2",
        "SMALLEST_MOVE = 0.0",
        "parity/test_constants.py::test_a_loss_has_to_move_by_a_hundredth",
    ),
    (
        "JAX may be three times as far as PyTorch",
        "parity/verdicts.py",
        "bound=2 * errors[1] + unit",
        "bound=3 * errors[1] + unit",
        ("parity/test_constants.py::test_jax_may_be_twice_as_far_as_torch_and_one_rounding_more"),
    ),
)

CHOICES_ALL = (
    *CONFIGURATION,
    *INITIALISATIONS,
    *FILES,
    *WRITING,
    *PARITY,
)
