"""The effect of quantization on what runs beside a decoder, and on answers to prompts that it reads partly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gralora_fx.base.features import parts
from gralora_fx.core.model.companions import companions_of
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace
from gralora_fx.exporters.verify.comparable import evaluating, variants
from gralora_fx.exporters.verify.outputs import OutputComparison
from gralora_fx.exporters.verify.quality_figures import QualityTally, compare_outputs, float32_reference
from gralora_fx.exporters.verify.together import TogetherRun, reference_of
from gralora_fx.format.manifest import Manifest
from gralora_fx.format.quantized_weights import OutputQuality, Quality, TokenQuality
from gralora_fx.run.sessions.session import Runtime, open_session


def companion_quality(
    directory: Path,
    model: TracedModel | GraloraModel,
    manifest: Manifest,
    tokenizer: Any,
    session: Any,
    runtime: Runtime,
) -> Quality:
    """Compare companions, and answers to prompts that they read partly, as exported and in float32, in every state.

    `session` is the decoder's, opened with `runtime`, as the companions' will be.
    """
    (check,) = parts("companion checks", manifest.companions)
    sessions = {name: open_session(directory, runtime, name=f"{name}.onnx") for name in manifest.companions}
    own = companions_of(model)
    outputs: list[OutputQuality] = []
    tokens: list[TokenQuality] = []
    descriptions: list[str] = []
    for variant in variants(session, model, manifest, directory, companions=sessions):
        models = {name: reference_of(name, part, manifest, variant, None) for name, part in own.items()}
        label = "" if variant.name is None else f" with {variant.name!r}"
        with variant.active(), float32_reference(model) as reference:
            for name, companion in models.items():
                inputs, description = check.measured(base_trace(companion), tokenizer, seed=0)
                with evaluating(model, companion):
                    comparison = OutputComparison(variant.companions[name], companion, "all")
                    found = compare_outputs(comparison, [(description, each) for each in inputs], description)
                outputs += [dataclasses.replace(each, name=f"{name}: {each.name}{label}") for each in found.outputs]
                descriptions.append(description)
            tally, generator = QualityTally(), torch.Generator().manual_seed(0)
            check.compare_tokens(
                TogetherRun(
                    models,
                    variant.companions,
                    reference,
                    variant.session,
                    None,
                    variant.name,
                    tally,
                    generator,
                    quick=True,
                    inputs=inputs,
                )
            )
        tokens.append(tally.of_steps(variant.name))
    return Quality(", ".join(dict.fromkeys(descriptions)), tuple(outputs), tuple(tokens))
