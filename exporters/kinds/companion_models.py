"""Companions of a decoder, such as a tower: ONNX models of their own in the same directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import onnx_ir as ir

from gralora_fx.base.features import parts
from gralora_fx.core.model.companions import companions_of
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, marked
from gralora_fx.exporters.formats import FLOAT
from gralora_fx.exporters.kinds.conversion import Conversion, conversion_of
from gralora_fx.exporters.kinds.data_sites import check_found
from gralora_fx.exporters.kinds.plain import plain_models
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.rules.adapters.site_marks import MarkedSites
from gralora_fx.format.export_directory import MODEL


def companion_conversions(model: TracedModel | GraloraModel, options: ExportOptions) -> dict[str, Conversion]:
    """Return the conversion of each companion; its weights stay floats even if the decoder's are quantized."""
    own = dataclasses.replace(
        options,
        quantize=FLOAT,
        bits=None,
        block_size=None,
        accuracy_level=None,
        logits="last",
        tokenizer=None,
        texts=None,
        dump=None,
    )
    found: dict[str, Conversion] = {}
    for name, part in companions_of(model).items():
        is_adapted = isinstance(part, GraloraModel)
        found[name] = conversion_of(part, own if is_adapted else dataclasses.replace(own, adapters="merged"))
    return found


def companion_models(conversions: Mapping[str, Conversion]) -> dict[str, ir.Model]:
    """Return the ONNX models of companions, by the names of their files.

    Raises:
        ExportError: One cannot be converted.
    """
    models: dict[str, ir.Model] = {}
    for name, conversion in conversions.items():
        try:
            models[name] = plain_models(conversion)[MODEL]
        except ExportError as error:
            raise ExportError(f"{name}.onnx cannot be made: {marked(error)}") from error
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
