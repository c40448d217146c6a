"""Planted bugs of what adapted models compute, and of how they learn."""

from parity_tests.mutants.planted import rows

REWRITER = rows(
    "rewriter",
    (
        "weights of different scales are joined with the first's",
        "rewrite/weight_moves.py",
        "return [replace(w, a=lowrank.scaled(w.a, w)) for w in weights], 1.0",
        "return weights, weights[0].scale",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
    (
        "one dropout mask for every turn of a while loop",
        "rewrite/rules/calls.py",
        "(None, None) if key is None else jax.random.split(key)",
        "(key, key)",
        "laws/test_structure_by_hand.py::test_every_turn_of_a_loop_draws_its_own_mask",
    ),
    (
        "one dropout mask for every step of a scan",
        "rewrite/rules/calls.py",
        'jax.random.split(key, call.params["length"])',
        'jax.numpy.stack([key] * call.params["length"])',
        "laws/test_structure_by_hand.py::test_every_turn_of_a_loop_draws_its_own_mask",
    ),
    (
        "a cast of W casts A and B",
        "rewrite/rules/factors.py",
        ("return replace(weight, base=base) if is_complex(dtype) else _real(weight, base)"),
        (
            "return weight if weight.planning else replace(weight, base=base, "
            "a=weight.a.astype(dtype), b=weight.b.astype(dtype))"
        ),
        "laws/test_structure_by_hand.py::test_a_cast_of_the_weight_leaves_a_and_b",
    ),
    (
        "W times a number leaves A·B as it is",
        "rewrite/rules/factors.py",
        "lambda b, number: b * number",
        "lambda b, number: b",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
    (
        "−W leaves A·B as it is",
        "rewrite/rules/factors.py",
        "None if weight.planning else -weight.b",
        "weight.b",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
    (
        "W over a number multiplies A·B",
        "rewrite/rules/factors.py",
        "lambda b, number: b / number",
        "lambda b, number: b * number",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
    (
        "stop_gradient lets A and B learn",
        "rewrite/rules/structure.py",
        "jax.tree.map(lax.stop_gradient, weight)",
        "replace(weight, base=lax.stop_gradient(weight.base))",
        "laws/test_structure_by_hand.py::test_what_the_author_freezes_does_not_learn",
    ),
    (
        "a weight turned around keeps its A and B",
        "rewrite/rules/structure.py",
        "lax.rev(array, (at,))",
        "lax.rev(array, (at,)) if array is weight.base else array",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
    (
        "joined factors overlap",
        "rewrite/weight_moves.py",
        "start = 0 if stacked else before",
        "start = 0",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
)

LOW_RANK_PRODUCTS = rows(
    "low-rank products",
    (
        "the path is rounded before the sum",
        "core/lowrank.py",
        "return (y.astype(wide) + addend.astype(wide)).astype(y.dtype)",
        "return y + addend.astype(y.dtype)",
        "laws/test_core.py::test_merging_into_bf16_sums_in_fp32_and_rounds_once",
    ),
    (
        "a scale that is an array gets a gradient",
        "core/lowrank.py",
        "x * lax.stop_gradient(jnp.asarray(adapter.scale, x.dtype))",
        "x * jnp.asarray(adapter.scale, x.dtype)",
        (
            "laws/test_structure_by_hand.py::test_a_scale_that_is_an_array_counts_and_gets_no_gradient"
        ),
    ),
    (
        "products of one input exchange their x·A",
        "core/lowrank.py",
        ("return lax.split(whole, [factor.shape[-1] for factor in factors], axis=whole.ndim - 1)"),
        (
            "return lax.split(whole, [factor.shape[-1] for factor in factors], "
            "axis=whole.ndim - 1)[::-1]"
        ),
        "laws/test_values_by_hand.py::test_products_of_one_input_keep_their_own_a_where_they_share",
    ),
    (
        "dropout's 1/(1 − p) is 1 + p",
        "core/lowrank.py",
        "adapter.scale / (1 - adapter.dropout)",
        "adapter.scale * (1 + adapter.dropout)",
        "laws/test_dropout.py::test_what_is_kept_is_scaled_exactly",
    ),
    (
        "A's axes are mistaken where the weight is used transposed",
        "core/lowrank.py",
        "return (OUT, IN) if transposed else (IN, OUT)",
        "return (IN, OUT)",
        "laws/test_structure_by_hand.py::test_what_is_done_to_a_weight_is_done_to_its_change",
    ),
)

DORA = rows(
    "DoRA",
    (
        "the norm misses half of the cross term",
        "core/delta.py",
        "(2 * conj(wa) +",
        "(conj(wa) +",
        ("laws/test_dora.py::test_dropout_takes_inputs_from_what_dora_adds_and_none_from_the_base"),
    ),
    (
        "the norm is not detached",
        "core/delta.py",
        "norm = lax.stop_gradient(dora_norm(weight, adapter))",
        "norm = dora_norm(weight, adapter)",
        "laws/test_dora.py::test_the_norm_gets_no_gradient_and_bf16_rounds_once",
    ),
    (
        "the gain is upside down",
        "core/delta.py",
        "adapter.magnitude / jnp.where(norm == 0, 1, norm)",
        "jnp.where(norm == 0, 1, norm) / adapter.magnitude",
        "laws/test_dora.py::test_the_norm_gets_no_gradient_and_bf16_rounds_once",
    ),
)

MERGING = rows(
    "merging",
    (
        "the second range of a weight forgets the first",
        "adapters/merge.py",
        "changes.merged(changed.get(path, leaves[path]), adapter)",
        "changes.merged(leaves[path], adapter)",
        "laws/test_structure_by_hand.py::test_ranges_of_one_weight_are_merged_where_they_are",
    ),
    (
        "an adapter's bias is merged without the scale",
        "core/delta.py",
        ("return jnp.expand_dims(lowrank.scaled(exact, adapter), adapter.axes.count(STACKED))"),
        "return jnp.expand_dims(exact, adapter.axes.count(STACKED))",
        (
            "laws/test_lora_bias.py::test_merging_rounds_once_adds_to_a_bias_trained_in_full_and"
            "_reports_it"
        ),
    ),
    (
        "a range is merged at the first column",
        "core/delta.py",
        "lowrank.add(old, change), start, axis)",
        "lowrank.add(old, change), 0, axis)",
        "laws/test_structure_by_hand.py::test_ranges_of_one_weight_are_merged_where_they_are",
    ),
    (
        "DoRA is merged without its gain",
        "core/delta.py",
        "with_gain(lowrank.add(wide, change), gain(weight, adapter), adapter.axes)",
        "lowrank.add(wide, change)",
        "laws/test_values_by_hand.py::test_dora_is_merged_with_its_gain",
    ),
    (
        "rounding is not warned of",
        "adapters/merge.py",
        "LARGEST_LOSS = 0.1",
        "LARGEST_LOSS = 1.1",
        "adapters/test_algebra.py::test_a_small_delta_is_lost_in_bfloat16_and_said_so",
    ),
    (
        "whole leaves are left out of a merge",
        "adapters/merge.py",
        "path: one.value for path, one in adapters.items() if isinstance(one, Full)",
        "path: leaves[path] for path, one in adapters.items() if isinstance(one, Full)",
        "peft/test_whole_modules.py::test_embeddings_stay_as_they_are_and_kernels_are_turned",
    ),
)

MANY_ADAPTERS = rows(
    "many adapters",
    (
        "unstack gives every adapter the first's scale",
        "adapters/stack.py",
        "scale = stacked.scales[path][k]",
        "scale = stacked.scales[path][0]",
        "adapters/test_many.py::test_unstack_undoes_stack",
    ),
    (
        "every example has the same dropout",
        "adapters/stack.py",
        "jax.random.split(dropout_key, size)",
        "jax.numpy.stack([dropout_key] * size)",
        "adapters/test_many.py::test_examples_drop_their_own_inputs",
    ),
    (
        "index −1 is the last adapter",
        "adapters/stack.py",
        "wrap_negative_indices=False",
        "wrap_negative_indices=True",
        "adapters/test_many.py::test_no_adapter_is_the_base_bit_for_bit",
    ),
)

LAYERS = rows(
    "layers",
    (
        "dropout acts when deterministic",
        "linen/layers.py",
        'if nn.merge_param("deterministic", module.deterministic, deterministic):',
        'if not nn.merge_param("deterministic", module.deterministic, deterministic):',
        "laws/test_layers.py::test_dropout_zeroes_and_scales_the_elements_of_x",
    ),
    (
        "the axes of DenseGeneral are not sorted",
        "core/flax_layer.py",
        "(sorted(n % x.ndim for n in dims) for dims in (axis, batch_dims))",
        "([n % x.ndim for n in dims] for dims in (axis, batch_dims))",
        "laws/test_layers_by_hand.py::test_axes_that_are_named_out_of_order_are_summed_as_the_kernel_has_them",
    ),
    (
        "a layer's scale is r/alpha",
        "core/flax_layer.py",
        "lora_config.scale(config, config.r, config.lora_alpha)",
        "lora_config.scale(config, config.lora_alpha, config.r)",
        "laws/test_layers_by_hand.py::test_alpha_r_and_rslora_make_the_scale",
    ),
    (
        "lora_dtype is float32",
        "linen/layers.py",
        "config.r, module.lora_dtype)",
        "config.r, jnp.float32)",
        "laws/test_layers_by_hand.py::test_a_and_b_have_the_dtype_that_is_asked_for",
    ),
    (
        "from_linear draws a new kernel",
        "nnx/layers.py",
        "layer.kernel, layer.bias = kernel, bias",
        "layer.bias = bias",
        "laws/test_layer_models.py::test_from_linear_shares_the_variables",
    ),
)

ALORA = rows(
    "aLoRA",
    (
        "the first occurrence counts",
        "core/alora.py",
        ("last = jnp.max(jnp.where(found, jnp.arange(starts), -1), axis=-1, keepdims=True)"),
        (
            "last = jnp.where(found.any(-1, keepdims=True), jnp.argmax(found, axis=-1, "
            "keepdims=True), -1)"
        ),
        "laws/test_alora.py::test_the_mask_is_pefts",
    ),
    (
        "the first invocation token is not active",
        "core/alora.py",
        ">= last) & (last >= 0)",
        "> last) & (last >= 0)",
        "laws/test_alora.py::test_the_mask_is_pefts",
    ),
    (
        "an example without the tokens is active",
        "core/alora.py",
        ">= last) & (last >= 0)",
        ">= last)",
        "laws/test_alora.py::test_the_mask_is_pefts",
    ),
    (
        "only the first token of the invocation is looked for",
        "core/alora.py",
        "for n, token in enumerate(invocation_tokens):",
        "for n, token in enumerate(invocation_tokens[:1]):",
        "laws/test_alora.py::test_the_mask_is_pefts",
    ),
)

OPTIMIZERS = rows(
    "optimizers",
    (
        "LoRA+ makes A fast, too",
        "optim/optimizers.py",
        '"a": optimizer(learning_rate, weight_decay)',
        '"a": optimizer(fast, weight_decay)',
        "train/test_optimizers_by_hand.py::test_the_first_step_of_loraplus_by_hand",
    ),
    (
        "LoRA+ lets biases decay",
        "optim/optimizers.py",
        '"vector": optimizer(fast, 0.0)',
        '"vector": optimizer(fast, weight_decay)',
        "train/test_optimizers.py::test_twenty_steps_are_pefts",
    ),
    (
        "LoRA+ gives embeddings the common rate",
        "optim/optimizers.py",
        '"embedding": optimizer(embedding_learning_rate, weight_decay)',
        '"embedding": optimizer(learning_rate, weight_decay)',
        "train/test_optimizers.py::test_twenty_steps_are_pefts",
    ),
    (
        "LoRA-FA divides by s",
        "optim/optimizers.py",
        "jnp.asarray(adapter.scale, g.dtype) ** 2",
        "jnp.asarray(adapter.scale, g.dtype)",
        "train/test_optimizers_by_hand.py::test_the_first_step_of_lora_fa_by_hand",
    ),
    (
        "the preconditioner of B is A's transposed",
        "optim/optimizers.py",
        "g_b = _damped_inverse(a.swapaxes(1, 2) @ a, reg)",
        "g_b = _damped_inverse(b @ b.swapaxes(1, 2), reg)",
        "train/test_optimizers_by_hand.py::test_the_first_step_of_riemannian_by_hand",
    ),
    (
        "AdamW's second moment is not squared",
        "optim/adam.py",
        "(1 - b2) * g * g",
        "(1 - b2) * abs(g)",
        "train/test_optimizers.py::test_twenty_steps_are_pefts",
    ),
    (
        "AdamW corrects the first moment by b2",
        "optim/adam.py",
        "corrected = m / _one_minus_power(b1, t)",
        "corrected = m / _one_minus_power(b2, t)",
        "train/test_optimizers.py::test_twenty_steps_are_pefts",
    ),
    (
        "smoothing forgets the label's own share",
        "optim/losses.py",
        "wanted = jnp.where(at, 1 - how.smoothing + even, even)",
        "wanted = jnp.where(at, 1 - how.smoothing, even)",
        "train/test_losses.py::test_smoothed_values_and_every_gradient_are_pytorchs",
    ),
    (
        "smoothing forgets the mean of the head",
        "optim/losses.py",
        "(1 - how.smoothing) * columns + how.smoothing * mean",
        "(1 - how.smoothing) * columns",
        "train/test_losses.py::test_smoothed_values_and_every_gradient_are_pytorchs",
    ),
    (
        "the loss is a mean over ignored tokens, too",
        "optim/losses.py",
        "jnp.sum(labels != how.ignore_index).astype(total.dtype)",
        "jnp.sum(labels == labels).astype(total.dtype)",
        "train/test_losses.py::test_another_ignored_label_and_rows_of_anything_under_it",
    ),
)

NUMBERS_ALL = (
    *REWRITER,
    *LOW_RANK_PRODUCTS,
    *DORA,
    *MERGING,
    *MANY_ADAPTERS,
    *LAYERS,
    *ALORA,
    *OPTIMIZERS,
)
