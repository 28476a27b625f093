"""Which worker runs which test files, and in which order, so that all workers end together."""

from __future__ import annotations

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
}
# The files that take longest, longest first: what is left for the end is short, so that no worker waits for another.
LONG = (
    "model/test_trainer.py",
    "tracing/test_image_sizes.py",
    "architectures/test_decoder_architectures.py",
    "architectures/test_encoder_architectures.py",
    "exporters/test_image_size_export.py",
    "exporters/test_transformers_js.py",
    "exporters/test_fusion.py",
    "exporters/test_encoder_decoder_export.py",
    "test_cli.py",
    "test_demo.py",
    "tracing/test_modes.py",
    "exporters/test_directory.py",
    "tracing/test_branches.py",
    "exporters/test_plain.py",
    "exporters/test_sentence_export.py",
    "properties/test_changes.py",
    "tracing/test_encoder_decoder.py",
    "test_examples.py",
    "exporters/test_head_sizes.py",
)
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
