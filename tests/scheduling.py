"""Which worker runs which test files, and in which order, so that all workers end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from xdist.scheduler import LoadFileScheduling

# Files that trace the same tiny models: one worker runs those of a group, so that each trace is made once.
GROUPS = {
    "parity": (
        "parity/test_parity_lora.py",
        "parity/test_parity_encoder_decoders.py",
        "parity/test_parity_more_decoders.py",
        "parity/test_parity_encoders.py",
        "parity/test_parity_decoders.py",
        "parity/test_parity_vision_and_plain.py",
    ),
    "traces": (
        "tracing/test_trace.py",
        "planning/test_targets.py",
        "model/test_gralora_model.py",
        "adapters/test_checkpoint.py",
        "adapters/test_weighted.py",
        "model/test_merging.py",
        "config/test_reading.py",
        "config/test_expressions.py",
        "planning/test_planning.py",
        "graph/test_sites.py",
        "graph/test_user_passes.py",
        "tracing/test_arguments.py",
        "properties/test_properties.py",
        "exporters/test_onnx.py",
        "exporters/test_float64_reference.py",
        "model/test_copies.py",
        "model/test_inspection.py",
        "picture/test_flow.py",
        "picture/test_page.py",
        "picture/test_saving.py",
        "picture/test_svg.py",
        "sources/test_atomic_save.py",
        "tracing/test_subgraphs.py",
        "test_usage_examples.py",
    ),
    "adapters as data": (
        "exporters/test_adapters_as_data.py",
        "exporters/test_adapter_contract.py",
        "serving/test_adapters.py",
        "serving/test_damaged_adapters.py",
        "exporters/test_onnxruntime_web.py",
    ),
    "traces with a cache": (
        "exporters/test_precision.py",
        "exporters/test_streaming.py",
        "exporters/test_quantization.py",
        "exporters/test_dynamic_quantization.py",
        "exporters/test_rounding_report.py",
        "exporters/test_verify.py",
        "exporters/test_pipeline.py",
        "exporters/test_flavours.py",
        "serving/test_empty.py",
        "serving/test_generation.py",
        "serving/test_model.py",
        "serving/test_providers.py",
        "exporters/test_verify_providers.py",
        "exporters/test_fold_onnx.py",
        "exporters/test_fold_quantized.py",
        "exporters/test_fold_bad_input.py",
        "exporters/test_fold_foreign.py",
        "exporters/test_batched_export.py",
        "serving/test_batched.py",
        "serving/test_http_text.py",
        "serving/test_request_schedulers.py",
        "serving/test_http_encoders.py",
        "serving/test_http_command.py",
        "serving/test_http_metrics.py",
        "serving/test_http_page_browser.py",
        "serving/test_http_logprobs.py",
        "serving/test_http_openai.py",
        "serving/test_sampling.py",
    ),
    "encoder-decoders": (
        "serving/test_encoder_decoder_rows.py",
        "serving/test_seq2seq_generation.py",
        "serving/test_http_seq2seq.py",
    ),
}
# The files that take longest, longest first: what is left for the end is short, so that no worker waits for another.
LONG = (
    "serving/test_ray_service.py",
    "serving/test_http_clients.py",
    "model/test_trainer.py",
    "features/test_image_sizes.py",
    "architectures/test_decoder_architectures.py",
    "architectures/test_encoder_architectures.py",
    "exporters/test_base_of_data_exports.py",
    "parity/test_against_float64.py",
    "serving/test_neighbours.py",
    "features/test_image_size_export.py",
    "exporters/test_transformers_js.py",
    "exporters/test_fusion.py",
    "exporters/test_encoder_decoder_export.py",
    "test_cli.py",
    "test_demo.py",
    "tracing/test_modes.py",
    "exporters/test_directory.py",
    "tracing/test_branches.py",
    "exporters/test_plain.py",
    "features/test_sentence_export.py",
    "properties/test_changes.py",
    "tracing/test_encoder_decoder.py",
    "test_examples.py",
    "exporters/test_head_sizes.py",
)
# Tests of many models, sizes or moments that take long: `make test` runs every n-th of each, `make test-all` all.
SAMPLED = {
    "architectures/test_decoder_architectures.py::test_tokens_are_the_models_and_every_layer_is_fused": 6,
    "architectures/test_encoder_architectures.py::test_models_that_read_speech_are_exported_likewise": 2,
    "architectures/test_encoder_architectures.py::test_the_export_gives_the_models_values_and_every_layer_is_fused": 6,
    "architectures/test_expert_architectures.py::test_every_family_with_experts_is_exported_in_few_bits": 24,
    "architectures/test_expert_architectures.py::test_experts_are_one_operator_a_layer": 2,
    "architectures/test_expert_architectures.py::test_linear_layers_and_experts_alone_are_quantized": 4,
    "exporters/test_adapter_contract.py::test_other_precisions_pass_verification": 7,
    "exporters/test_adapter_contract.py::test_the_base_graph_is_kept_beside_few_nodes": 3,
    "exporters/test_adapters_as_data.py::test_one_export_takes_any_adapter": 25,
    "exporters/test_adapters_as_data.py::test_so_do_required_inputs": 3,
    "exporters/test_adapters_as_data.py::test_without_an_adapter_it_is_the_base_bit_for_bit": 4,
    "exporters/test_any_length.py::test_one_session_takes_any_batch_and_length": 2,
    "exporters/test_base_of_data_exports.py::test_every_family_is_its_base": 11,
    "exporters/test_base_of_data_exports.py::test_so_is_every_form_precision_and_mode": 4,
    "exporters/test_batched_export.py::test_decoders_are_verified_in_chunks_and_steps": 4,
    "exporters/test_batched_export.py::test_encoders_are_verified_with_every_adapter_in_one_batch": 2,
    "exporters/test_batched_export.py::test_ranks_may_differ_from_layer_to_layer": 3,
    "exporters/test_directory.py::test_an_interrupted_export_leaves_nothing_half_written": 4,
    "exporters/test_dynamic_quantization.py::test_a_text_has_the_same_result_beside_loud_ones": 3,
    "exporters/test_dynamic_quantization.py::test_every_kind_of_export_is_verified_and_measured": 3,
    "exporters/test_encoder_attention.py::test_every_layer_is_one_operator": 4,
    "exporters/test_encoder_decoder_export.py::test_greedy_tokens_of_padded_batches_are_those_of_generate": 7,
    "exporters/test_encoder_decoder_export.py::test_the_encoder_and_a_first_step_are_the_models": 3,
    "exporters/test_few_bits.py::test_every_kind_of_model_is_run_to_choose": 2,
    "exporters/test_flatten_tokens.py::test_a_classifier_reads_the_first_position_whatever_the_padding": 4,
    "exporters/test_flatten_tokens.py::test_outputs_are_the_models_and_zero_at_padding": 4,
    "exporters/test_fold_foreign.py::test_a_quantized_model_of_genais_builder": 2,
    "exporters/test_fold_foreign.py::test_genais_builder": 2,
    "exporters/test_fold_onnx.py::test_a_fold_is_an_export_of_the_merged_model": 2,
    "exporters/test_fold_onnx.py::test_a_tied_head_gets_a_weight_of_its_own": 2,
    "exporters/test_fold_quantized.py::test_requantized_from_the_base_it_is_a_fresh_quantized_export": 2,
    "exporters/test_fold_several.py::test_a_head_and_biases_within_a_wrapper_are_found_as_layers_are": 2,
    "exporters/test_fusion.py::test_layers_become_the_operators_that_the_runtime_is_fast_at": 4,
    "exporters/test_onnx.py::test_onnx_runtime_equals_the_adapted_model": 2,
    "exporters/test_precision.py::test_a_model_of_half_precision_takes_inputs_of_its_own": 4,
    "exporters/test_precision.py::test_half_precision_exports_hold": 4,
    "exporters/test_precision.py::test_what_stays_float32_is_what_the_half_precision_model_computes_so": 2,
    "exporters/test_quantization.py::test_quantized_exports_compute_what_the_rounded_model_does": 2,
    "exporters/test_rows_graph.py::test_a_model_without_such_a_graph_is_exported_and_the_reason_said": 2,
    "exporters/test_rows_graph.py::test_both_graphs_read_the_same_bytes": 2,
    "exporters/test_rows_graph.py::test_every_kind_of_decoder": 2,
    "exporters/test_rows_graph.py::test_rows_with_an_adapter_each_answer_as_peft_does": 3,
    "exporters/test_streaming.py::test_a_model_without_a_cache_streams_too": 2,
    "exporters/test_streaming.py::test_a_streamed_export_is_the_other_byte_for_byte": 4,
    "exporters/test_strict_base.py::test_an_adapter_of_another_base_is_named_and_refused_strictly": 2,
    "exporters/test_strict_base.py::test_its_own_base_is_used_without_a_word": 2,
    "exporters/test_trained_heads.py::test_heads_and_biases_are_pefts": 5,
    "exporters/test_transformers_js.py::test_an_encoder_decoder_runs_unchanged": 2,
    "features/test_few_bits_of_states.py::test_a_hybrid_holds_in_few_bits": 3,
    "features/test_four_bit_bases.py::test_a_fold_into_its_export": 4,
    "features/test_image_size_export.py::test_one_session_takes_images_of_any_size": 8,
    "features/test_image_sizes.py::test_a_trace_for_one_size_says_why_and_names_it": 2,
    "features/test_image_sizes.py::test_images_of_other_sizes_equal_the_eager_model": 4,
    "features/test_packed_bases.py::test_training_over_packed_weights_is_that_over_dense_ones": 10,
    "features/test_quantized_bases.py::test_an_adapter_on_it_has_pefts_outputs": 3,
    "features/test_sentence_export.py::test_embeddings_are_sentence_transformers": 4,
    "features/test_state_exports.py::test_adapters_of_a_delta_rules_gates_are_data": 3,
    "features/test_state_rows.py::test_rows_side_by_side_are_each_as_alone": 4,
    "graph/test_sites.py::test_attention_multiplies_by_parts_of_one_weight": 2,
    "model/test_block_modules.py::test_blocks_are_found_and_own_their_parameters_under_the_source_models_names": 3,
    "model/test_block_modules.py::test_checkpointing_changes_no_bit_of_outputs_and_gradients_and_keeps_less": 2,
    "model/test_block_modules.py::test_it_compiles_whole_and_once_for_every_size": 2,
    "model/test_block_modules.py::test_what_runs_is_bit_for_bit_the_flat_graph": 2,
    "model/test_dtypes.py::test_a_converted_trace_is_a_trace_of_the_converted_model": 9,
    "model/test_dtypes.py::test_checkpointing_over_a_converted_model_changes_no_bit": 4,
    "model/test_dtypes.py::test_values_and_gradients_are_those_of_peft_converted_alike": 24,
    "model/test_generate.py::test_tokens_are_those_of_pefts_generate": 3,
    "model/test_gralora_model.py::test_merging_and_back_is_bit_for_bit": 4,
    "model/test_merging.py::test_a_tied_weight_is_untied_on_request": 2,
    "model/test_trainer.py::test_accumulated_batches_are_one_large_batch": 3,
    "model/test_trainer.py::test_label_smoothing_is_pefts": 4,
    "model/test_trainer.py::test_trainer_checkpoints_without_another_loss": 3,
    "model/test_trainer.py::test_training_evaluation_and_prediction_are_pefts": 8,
    "model/test_trl.py::test_sft_with_its_defaults_trains_as_with_peft": 4,
    "model/test_trl.py::test_trainers_with_a_reference_adapter_train_as_with_peft": 2,
    "operators/test_operators.py::test_pytorchs_checks_of_schema_fake_tensors_and_gradients_pass": 3,
    "operators/test_operators.py::test_the_decomposition_computes_what_the_reference_does_on_every_size": 3,
    "parity/test_against_float64.py::test_gradients_are_as_exact_as_pefts": 11,
    "parity/test_expert_adapters.py::test_a_checkpoint_of_pefts_computes_merges_and_goes_back": 3,
    "parity/test_expert_adapters.py::test_the_files_of_a_base_are_merged_into": 3,
    "parity/test_parity_decoders.py::test_the_same_as_in_peft": 10,
    "parity/test_parity_encoder_decoders.py::test_the_same_as_in_peft": 10,
    "parity/test_parity_encoders.py::test_the_same_as_in_peft": 10,
    "parity/test_parity_lora.py::test_the_same_as_in_peft": 16,
    "parity/test_parity_more_decoders.py::test_the_same_as_in_peft": 10,
    "parity/test_parity_vision_and_plain.py::test_the_same_as_in_peft": 4,
    "parity/test_recurrent_layers.py::test_logits_and_gradients_are_pefts": 3,
    "picture/test_every_method.py::test_a_method_beside_another": 2,
    "serving/test_answer_grammars.py::test_every_answer_of_a_random_model_meets_its_schema": 2,
    "serving/test_draft_rows.py::test_in_other_architectures": 2,
    "serving/test_empty.py::test_no_empty_axis_reaches_the_runtime": 2,
    "serving/test_encoder_decoder_rows.py::test_a_row_runs_with_its_adapter": 3,
    "serving/test_encoder_decoder_rows.py::test_tokens_are_those_of_generate_by_the_models_own_rules": 3,
    "serving/test_example_inputs.py::test_every_kind_of_model": 4,
    "serving/test_generation.py::test_greedy_tokens_are_pytorchs": 2,
    "serving/test_http_neighbours.py::test_classes_of_texts_together_are_those_of_each_alone": 4,
    "serving/test_http_schema.py::test_answers_are_as_described": 4,
    "serving/test_live_adapters.py::test_encoders_of_every_kind": 4,
    "serving/test_model.py::test_the_context_is_what_the_model_takes": 2,
    "serving/test_neighbours.py::test_together_alone_and_transformers_agree": 2,
    "serving/test_sampling.py::test_greedy_answers_are_transformers": 2,
    "serving/test_speech_prompt.py::test_the_feature_extractor_beside_a_tokenizer_is_exported_too": 2,
    "serving/test_speech_prompt.py::test_tokens_are_those_of_whispers_generate": 2,
    "serving/test_without_answer_features.py::test_its_fields_are_refused_and_texts_are_served": 5,
    "test_readme_commands.py::test_every_command_runs": 4,
    "test_usage_examples.py::test_an_example_adapts_pefts_modules_and_gives_pefts_logits": 2,
    "test_without_features.py::test_a_decoder_is_exported_and_served_without_it": 9,
    "tracing/test_branches.py::test_a_layer_within_a_branch_or_loop_is_adapted_as_by_peft": 2,
    "tracing/test_cached.py::test_attention_is_one_node_a_layer": 4,
    "tracing/test_cached.py::test_steps_of_every_size_equal_the_eager_model": 6,
    "tracing/test_encoder_decoder.py::test_calls_of_every_size_equal_the_eager_model": 7,
    "tracing/test_modes.py::test_training_noise_has_the_eager_models_size": 4,
    "tracing/test_trace.py::test_a_mask_that_is_not_given_is_all_ones": 6,
    "tracing/test_trace.py::test_inputs_made_from_a_configuration_have_the_models_data_type": 2,
    "tracing/test_trace.py::test_other_sizes_and_padded_rows_equal_the_eager_model": 21,
    "tracing/test_trace.py::test_outputs_are_of_the_models_own_class": 4,
    "tracing/test_trace.py::test_the_graph_shares_the_models_parameters": 4,
    "tracing/test_trace.py::test_the_mask_is_an_input_that_matters": 4,
    "tracing/test_trace.py::test_the_source_model_is_as_it_was": 2,
}
_GROUP_OF = {f"tests/{file}": group for group, files in GROUPS.items() for file in files}
_RANK = {
    f"tests/{file}": rank for rank, file in enumerate(file for files in (*GROUPS.values(), LONG) for file in files)
}


class GroupScheduling(LoadFileScheduling):
    """Gives a worker a file at a time, or a group of files."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return _GROUP_OF.get(file, file)


def rank(item: pytest.Item) -> int:
    """The place of a test's file in the order: groups and long files first, the others after them as they come."""
    return _RANK.get(item.nodeid.split("::")[0], len(_RANK))


def sampled(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Tests without those of `SAMPLED` that `make test` leaves out."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        function = item.nodeid.partition("[")[0].removeprefix("tests/")
        if seen[function] % SAMPLED.get(function, 1) == 0:
            kept.append(item)
        seen[function] += 1
    return kept
