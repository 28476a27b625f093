"""The public names, pinned: a change here is a change for users."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import gralora_fx
from gralora_fx import errors

pytestmark = pytest.mark.quick


def test_the_package_exports_these_names() -> None:
    assert gralora_fx.__all__ == [
        "DoraConfig",
        "GraloraConfig",
        "GraloraModel",
        "LinearSite",
        "LoraConfig",
        "RewritePlan",
        "TracedModel",
        "merge",
        "plan",
        "rewrite",
        "trace",
    ]
    assert all(hasattr(gralora_fx, name) for name in gralora_fx.__all__)


@pytest.mark.parametrize(
    ("name", "is_value_error"),
    [
        ("ConfigError", True),
        ("TraceError", True),
        ("TargetError", True),
        ("RewriteError", True),
        ("MergeError", False),
        ("CheckpointError", False),
        ("ExportError", False),
        ("ServingError", False),
    ],
)
def test_errors(name: str, is_value_error: bool) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.GraloraError)
    assert issubclass(error, ValueError) is is_value_error


def test_signatures() -> None:
    def names(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    assert names(gralora_fx.trace) == [
        "model",
        "example_inputs",
        "kwargs",
        "task",
        "dynamic",
        "sentence_modules",
        "image_size",
        "blocks",
    ]
    assert names(gralora_fx.plan) == ["traced", "config"]
    assert names(gralora_fx.rewrite) == ["traced", "config_or_plan", "adapter_name"]
    assert names(gralora_fx.merge) == ["model", "adapter_names", "safe", "untie"]


def test_fields() -> None:
    def names(cls: type) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    assert names(gralora_fx.LinearSite) == [
        "path",
        "kind",
        "in_features",
        "out_features",
        "weight",
        "bias",
        "calls",
        "tied_with",
    ]
    assert {"config", "selected", "rejected"} <= set(names(gralora_fx.RewritePlan))
    assert all(hasattr(gralora_fx.RewritePlan, name) for name in ("trainable_parameters", "total_parameters"))
    assert names(gralora_fx.GraloraConfig) == [
        "r",
        "hybrid_r",
        "target_modules",
        "alpha",
        "gralora_dropout",
        "gralora_k",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
        "init_weights",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "gralora_k_pattern",
        "base_quantization",
        "target_parameters",
        "alora_invocation_tokens",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "active_adapters",
        "add_adapter",
        "configs",
        "delete_adapter",
        "disable_adapter",
        "get_nb_trainable_parameters",
        "load_adapter",
        "merge_adapter",
        "merge_and_unload",
        "print_trainable_parameters",
        "save_pretrained",
        "set_adapter",
        "sites",
        "unload",
        "unmerge_adapter",
    ],
)
def test_a_rewritten_model_has_pefts_names(name: str) -> None:
    assert hasattr(gralora_fx.GraloraModel, name)
