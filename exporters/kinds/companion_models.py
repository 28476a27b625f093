"""Companions of a decoder, such as a tower: ONNX models of their own in the same directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir

from gralora_fx.base.features import parts
from gralora_fx.core.model.companions import companions_of
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.errors import ExportError, marked
from gralora_fx.exporters.kinds.conversion import Conversion, conversion_of
from gralora_fx.exporters.kinds.data_sites import check_found
from gralora_fx.exporters.kinds.plain import plain_models
from gralora_fx.exporters.rules.adapters.site_marks import MarkedSites
from gralora_fx.format.export_directory import MODEL


def companion_conversions(decoder: Conversion) -> dict[str, Conversion]:
    """Return the conversion of each companion of a decoder."""
    own, sites = decoder.options.of_companions(), decoder.adapters
    has_blocks = None if sites is None else sites.inputs.k > 0
    found: dict[str, Conversion] = {}
    for name, part in companions_of(decoder.model).items():
        of_part = own if isinstance(part, GraloraModel) else dataclasses.replace(own, adapters="merged")
        found[name] = conversion_of(part, of_part, has_blocks=has_blocks)
    return found


def choose_companion_formats(conversions: Mapping[str, Conversion], tokenizer: Any) -> dict[str, Conversion]:
    """Return the conversions with the formats of quantized companions chosen, on inputs like those that they read."""
    chosen = dict(conversions)
    for name, conversion in conversions.items():
        if conversion.plan is not None:
            from gralora_fx.exporters.quantize.choice import choose_formats
            from gralora_fx.exporters.verify.together import measuring

            plan = choose_formats(conversion, measuring(name, conversion.traced, tokenizer, seed=1))
            chosen[name] = dataclasses.replace(conversion, plan=plan)
    return chosen


def companion_models(conversions: Mapping[str, Conversion]) -> dict[str, ir.Model]:
    """Return the ONNX models of companions, by the names of their files."""
    models: dict[str, ir.Model] = {}
    for name, conversion in conversions.items():
        try:
            models[name] = plain_models(conversion)[MODEL]
        except ExportError as error:
            raise error.reworded(f"{name}.onnx cannot be made: {marked(error)}") from error
        if conversion.adapters is not None:
            check_found(conversion.adapters, (found.paths for found in conversion.log.summaries(MarkedSites)))
    return models


def program_models(
    conversion: Conversion, models: Mapping[str, ir.Model], companions: Collection[str]
) -> dict[str, ir.Model]:
    """Return models that other programs run instead of the decoder, over the same weights, by file name."""
    found: dict[str, ir.Model] = {}
    for graphs_of in parts("program graphs", companions):
        found |= graphs_of(conversion.traced.config, models)
    return found
