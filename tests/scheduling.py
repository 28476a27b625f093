"""Test files of each worker, and their order, so that all workers end together."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

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
    "model/test_sharding.py",
    "serving/test_http_clients.py",
    "serving/test_lm_eval.py",
    "exporters/test_dora_as_data.py",
    "features/test_kept_integers.py",
    "test_cli.py",
    "serving/test_speech_prompt.py",
    "serving/test_without_torch.py",
    "features/test_images_together.py",
    "features/test_image_inputs.py",
    "exporters/test_encoder_decoder_export.py",
    "exporters/test_directory.py",
    "exporters/test_strict_base.py",
    "model/test_block_modules.py",
    "features/test_image_families.py",
    "test_loaded_files.py",
    "architectures/test_encoder_architectures.py",
    "features/test_images_whole.py",
    "exporters/test_encoder_attention.py",
    "methods/test_dora.py",
    "features/test_sentence_export.py",
    "adapters/test_adapter_rows.py",
    "test_demo.py",
    "serving/test_speech_generation.py",
    "test_light_commands.py",
    "exporters/test_fold_several.py",
    "test_readme_commands.py",
    "test_extras.py",
    "serving/test_prefix_cache.py",
    "exporters/test_rows_graph.py",
    "parity/test_peft_faults.py",
    "features/test_image_programs.py",
    "test_without_features.py",
    "serving/test_http_tools.py",
    "serving/test_http_images.py",
    "adapters/test_first_step.py",
    "loading/test_loading.py",
    "model/test_trl.py",
    "features/test_state_rows.py",
    "test_examples.py",
    "serving/test_http_answer_formats.py",
    "exporters/test_plain.py",
    "test_versions.py",
    "loading/test_tokenizers.py",
    "serving/test_activated_prefixes.py",
    "features/test_activated_adapters.py",
    "serving/test_neighbours.py",
    "model/test_trainer.py",
    "serving/test_adapters_from_start.py",
    "exporters/test_trained_heads.py",
    "parity/test_expert_adapters.py",
    "features/test_state_exports.py",
    "cli/test_generate_command.py",
    "cli/test_generate_speech.py",
    "serving/test_live_adapters.py",
    "architectures/test_decoder_architectures.py",
    "serving/test_http_speech.py",
    "tracing/test_masks.py",
    "model/test_dtypes.py",
    "features/test_packed_bases.py",
    "features/test_image_processors.py",
    "features/test_four_bit_bases.py",
    "features/test_quantized_bases.py",
    "features/test_sentence_encoder.py",
    "exporters/test_few_bits.py",
    "features/test_image_sizes.py",
    "features/test_image_size_export.py",
    "tracing/test_modes.py",
    "tracing/test_branches.py",
    "exporters/test_transformers_js.py",
    "properties/test_changes.py",
    "tracing/test_encoder_decoder.py",
)
SAMPLED = tomllib.loads((Path(__file__).parent / "sampled.toml").read_text(encoding="utf-8"))
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
    """Return the place of a test's file: groups and long files first, the others after them as they come."""
    return _RANK.get(item.nodeid.split("::")[0], len(_RANK))


def sampled(items: Iterable[pytest.Item], *, slow: bool = False) -> list[pytest.Item]:
    """Return the tests that `make test` runs, or `make test-slow`."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        function = item.nodeid.partition("[")[0].removeprefix("tests/")
        is_slow = function in SAMPLED["slow"] or function.partition("::")[0] in SAMPLED["slow"]
        is_chosen = function not in SAMPLED["elsewhere"] and seen[function] % SAMPLED["every"].get(function, 1) == 0
        if is_chosen and is_slow == slow:
            kept.append(item)
        seen[function] += 1
    return kept
