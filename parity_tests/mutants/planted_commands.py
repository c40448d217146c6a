"""Planted bugs of the commands."""

from parity_tests.mutants.planted import rows

COMMANDS = rows(
    "commands",
    (
        "predict's batch size is not passed on",
        "cli/main.py",
        "        batch_size=options.batch_size,\n        cache=options.cache,",
        "        batch_size=16,\n        cache=options.cache,",
        (
            "cli/test_command_options.py::test_predict_takes_the_texts_then_the_tables_and_as_m"
            "any_at_a_time_as_asked"
        ),
    ),
    (
        "predict reads the column text whatever was asked",
        "cli/main.py",
        "read_texts(options.data, options.text_column)",
        "read_texts(options.data)",
        (
            "cli/test_command_options.py::test_predict_takes_the_texts_then_the_tables_and_as_m"
            "any_at_a_time_as_asked"
        ),
    ),
    (
        "merge does not hear of another base model",
        "cli/main.py",
        "        overwrite=options.overwrite,\n        model=options.model,",
        "        overwrite=options.overwrite,\n        model=None,",
        "cli/test_command_options.py::test_another_base_model_is_the_one_that_is_used",
    ),
    (
        "plan leaves nothing out",
        "cli/main.py",
        "exclude_modules=options.exclude_modules or None,",
        "exclude_modules=None,",
        "cli/test_command_options.py::test_plan_shows_what_each_option_changes",
    ),
    (
        "plan's alpha is 16",
        "cli/main.py",
        "lora_alpha=options.lora_alpha,",
        "lora_alpha=16,",
        "cli/test_command_options.py::test_plan_shows_what_each_option_changes",
    ),
    (
        "plan forms weights unasked",
        "cli/main.py",
        '"materialize" if options.materialize else "error"',
        '"error" if options.materialize else "materialize"',
        "cli/test_command_options.py::test_plan_forms_weights_on_demand_alone",
    ),
    (
        "predict's probability is the first class's",
        "train/predict.py",
        "float(row[best])",
        "float(row[0])",
        ("cli/test_command_options.py::test_predict_gives_json_the_same_numbers_and_every_class"),
    ),
    (
        "predict downloads elsewhere",
        "cli/main.py",
        "        batch_size=options.batch_size,\n        cache=options.cache,",
        "        batch_size=options.batch_size,\n        cache=None,",
        "cli/test_command_options.py::test_the_cache_is_where_the_model_is_looked_for",
    ),
    (
        "combine's weights are those of other adapters where one lacks a path",
        "adapters/combine.py",
        "[float(weights[n]) for n in present]",
        "[float(w) for w in weights[: len(present)]]",
        "cli/test_command_options.py::test_combine_weighs_each_adapter_with_its_own_weight",
    ),
    (
        "combine draws from seed 0",
        "cli/combine.py",
        "jax.random.key(options.seed)",
        "jax.random.key(0)",
        "cli/test_command_options.py::test_combine_draws_from_the_seed",
    ),
    (
        "combine adds instead of taking equal shares",
        "cli/combine.py",
        "share = 1 / max(len(trees), 1)",
        "share = 1.0",
        "cli/test_command_options.py::test_combine_weighs_each_adapter_with_its_own_weight",
    ),
    (
        "combine's rank is one too many",
        "adapters/combine.py",
        "r = svd_rank or max(",
        "r = 1 + max(",
        ("cli/test_command_options.py::test_combine_is_the_svd_of_its_rank_unless_told_otherwise"),
    ),
    (
        "combine's density is of what is dropped",
        "adapters/combine.py",
        "int(self.density * flat.shape[1])",
        "int((1 - self.density) * flat.shape[1])",
        (
            "cli/test_command_options.py::test_combine_prunes_to_the_density_and_elects_by_the_method"
        ),
    ),
    (
        "combine records no base model",
        "cli/combine.py",
        "fitted(opened[0][0], combined)",
        "fitted(opened[-1][0], combined)",
        "cli/test_command_options.py::test_combine_weighs_each_adapter_with_its_own_weight",
    ),
    (
        "convert does not hear of another alpha",
        "cli/convert.py",
        "lora_alpha=options.lora_alpha,",
        "lora_alpha=None,",
        (
            "cli/test_command_options.py::test_convert_keeps_what_the_directory_says_unless_tol"
            "d_otherwise"
        ),
    ),
    (
        "convert records no base model",
        "cli/convert.py",
        "if options.base_model is not None:",
        "if options.base_model is None:",
        (
            "cli/test_command_options.py::test_convert_takes_the_part_the_alpha_and_the_name_it_is_given"
        ),
    ),
    (
        "convert leaves DoRA's magnitudes behind",
        "peft/foreign/older_layouts.py",
        "            if ending in halves:\n                new[",
        "            if ending in ():\n                new[",
        "cli/test_convert.py::test_what_modules_have_beside_a_and_b_goes_along",
    ),
    (
        "the sentences of a report in Markdown are markup",
        "parity/reports/markdown.py",
        "*map(_in_table, sentences(report))",
        "*sentences(report)",
        "cli/test_markup.py::test_a_report_in_markdown_shows_names_as_they_are",
    ),
    (
        "texts with two labels are dropped unsaid",
        "train/finetune.py",
        "data.contradictions(texts)) > 0",
        "data.contradictions(texts)) > len(texts.labels)",
        "cli/test_messages.py::test_texts_with_several_labels_are_said",
    ),
    (
        "JSON of any number of values is parsed",
        "core/io/intake.py",
        "if marks > MOST_VALUES:",
        "if marks > MOST_VALUES**2:",
        "cli/test_intake.py::test_json_of_too_many_values_is_not_parsed",
    ),
    (
        "a missing tie_word_embeddings means apart",
        "cli/stored_weights.py",
        'config.get("tie_word_embeddings", True)',
        'config.get("tie_word_embeddings", False)',
        (
            "cli/test_command_options.py::test_a_head_shares_the_embedding_unless_the_model_say"
            "s_otherwise"
        ),
    ),
    (
        "square weights of Conv1D are merged as those of Linear",
        "cli/stored_weights.py",
        "(LOOKED_UP if transposed else LINEAR)",
        "LINEAR",
        "cli/test_file_commands.py::test_square_weights_alone_follow_the_flag",
    ),
    (
        "merge takes an aLoRA",
        "cli/merge.py",
        'refuse_masked(adapters, "they cannot be merged")',
        "dict(adapters)",
        "cli/test_command_options.py::test_an_alora_is_not_merged",
    ),
    (
        "diff is relative to the second",
        "cli/diff.py",
        '[""]), delta_norm(one))',
        '[""]), delta_norm(other))',
        "cli/test_file_commands.py::test_diff_shows_fields_and_deltas",
    ),
    (
        "diff says the wrong one of two",
        "cli/diff.py",
        "options.one if name in adapters else options.other",
        "options.other if name in adapters else options.one",
        "cli/test_file_commands.py::test_diff_shows_fields_and_deltas",
    ),
    (
        "inspect finds huge norms from 3,000 times the median on",
        "cli/inspect.py",
        "HUGE_TIMES = 30.0",
        "HUGE_TIMES = 3000.0",
        "cli/test_command_options.py::test_a_norm_of_thirty_times_the_median_is_suspicious",
    ),
    (
        "parity's seed is 0",
        "cli/main.py",
        "run_check(check, options.seed)",
        "run_check(check)",
        "cli/test_command_options.py::test_parity_runs_the_chosen_checks_from_the_seed",
    ),
    (
        "parity does not ask the oracle",
        "cli/parity.py",
        "mapping=mapping, oracle=oracle, seed=seed",
        "mapping=mapping, seed=seed",
        "cli/test_command_options.py::test_parity_asks_the_oracle_who_is_right",
    ),
    (
        "parity ends with 0 where the two differ",
        "cli/main.py",
        "else DIFFERENT",
        "else 0",
        "parity/test_command.py::test_the_exit_code_is_the_worst_verdicts",
    ),
    (
        "merge's report counts what rounding changed",
        "adapters/merge.py",
        "wanted & (old == new)",
        "wanted & (old != new)",
        "adapters/test_algebra.py::test_the_report_counts_what_rounding_left_unchanged",
    ),
)

COMMANDS_ALL = (*COMMANDS,)
