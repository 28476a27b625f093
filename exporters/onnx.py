"""`export_onnx`: a traced or rewritten model to a directory that ONNX Runtime serves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import fx

from gralora_fx.errors import ExportError, first_line, warn_caller
from gralora_fx.exporters.artifact.fingerprint import fingerprint_of
from gralora_fx.exporters.artifact.manifest import describe, write_manifest
from gralora_fx.exporters.artifact.staging import check_output, check_replaced, require_space, staged
from gralora_fx.exporters.flavours.flavour import Request
from gralora_fx.exporters.flavours.registry import flavour_of
from gralora_fx.exporters.folded_model import as_traced
from gralora_fx.exporters.fx_passes.cast_graph import precision_of, take_float32
from gralora_fx.exporters.onnx_passes.quantize import Quantization, quantize_models
from gralora_fx.exporters.options import check_export_options
from gralora_fx.exporters.pipeline import PassLog
from gralora_fx.exporters.reports import ExportReport, VerifyReport
from gralora_fx.exporters.verify import refuse_without_values, verify_onnx
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.loading.tokenizers import load_tokenizer
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.progress.gc_pause import fewer_collections
from gralora_fx.progress.timing import timed
from gralora_fx.runtime.manifest import describe_files, file_names
from gralora_fx.tracing.inputs.decoder_cache import PAST
from gralora_fx.tracing.normalize.modes import draws_randomly, set_mode
from gralora_fx.tracing.normalize.regions import drop_regions_for_inference
from gralora_fx.tracing.recapture import is_operator_graph, recapture
from gralora_fx.tracing.traced_model import TracedModel

_WRITERS, _IN_FLIGHT = 2, 2**28  # threads that make and write weights, and the bytes they hold


def export_onnx(
    model: TracedModel | GraloraModel,
    output_dir: str | Path,
    *,
    adapters: Literal["merged", "swappable", "batched"] = "merged",
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    quantize: Literal["int8", "int4"] | None = None,
    block_size: int = 32,
    accuracy_level: int = 4,
    logits: Literal["last", "all"] = "last",
    tokenizer: Any = None,
    verify: bool | Literal["quick", "full"] = True,
    overwrite: bool = False,
    dump: str | Path | None = None,
) -> ExportReport:
    """Export a model to `model.onnx` with its weights in `model.onnx_data`, and check it against PyTorch.

    An encoder-decoder with a cache becomes `encoder_model.onnx` and `decoder_model_merged.onnx`, optimum's layout.

    The directory is written whole or not at all: an earlier export at the same place is replaced, after an error it
    is as it was. The model keeps its state.

    Args:
        model: A traced model, or a rewritten one, whose active adapters are folded into the exported weights.
        output_dir: Where to write: new, empty, or an earlier export of the same base and task.
        adapters: How adapters are held; `"merged"` folds them.
        precision: Precision of weights, activations and the cache: `"fp32"`, `"fp16"` or `"bf16"`. What the model
            computes in float32 in half precision stays so; all other inputs and outputs are float32.
        quantize: Weight-only quantization, for any task: `"int8"`, `"int4"` or None. Adapters are folded first.
        block_size: Values of a matrix's input axis that share a scale; a power of two, 16 or more.
        accuracy_level: How ONNX Runtime multiplies with quantized weights: 0 its own choice, 1 in float32, 2 in
            float16, 3 in bfloat16, 4 in int8, its fastest.
        logits: For a decoder with a cache, whether the last position's logits are given or all.
        tokenizer: A tokenizer, a processor, or the directory of a tokenizer, to save beside the model.
        verify: Whether to compare ONNX Runtime with PyTorch on fresh inputs before the directory is put in place, and
            how thoroughly: True is `"quick"` (see `verify_onnx`). Not for a model whose weights are streamed
            (`loading.load_streamed`), which cannot be run.
        overwrite: Whether an earlier export of another base or task may be replaced.
        dump: A directory to write the graph to after each pass, as text; None for that of the environment variable
            `GRALORA_FX_DUMP`, or none.

    Returns:
        Files, seconds of each stage, what verification found, and what every pass did.

    Raises:
        ExportError: The output may not be written, the model cannot be exported, or the export does not compute what
            the model does.
        MergeError: An adapter cannot be folded.
    """
    check_export_options(adapters=adapters, precision=precision, logits=logits, verify=verify)
    how = None if quantize is None else Quantization(quantize, block_size, accuracy_level)
    check_output(output_dir)
    log = PassLog.asked_for(dump)
    seconds: dict[str, float] = {}
    with timed("fold", seconds):
        traced = as_traced(model)
        _refuse_unfit(traced, verify=bool(verify))
        flavour = flavour_of(traced)
        if logits == "all" and not flavour.has_last_logits:
            warn_caller("logits='all' is for a decoder with a cache; this model gives what its forward returns")
        if verify:
            refuse_without_values(model)
        if not overwrite:
            check_replaced(output_dir, task=traced.task, fingerprint=fingerprint_of(model))
    with timed("convert", seconds), fewer_collections():
        request = Request(traced, _graph_to_translate(traced), precision, logits, log)
        exported = flavour.convert(request)
        onnx_models, attention = exported.models, exported.attention
        for onnx_model in onnx_models.values():
            take_float32(onnx_model)
    quantized: dict[str, Any] | None = None
    if how is not None:
        with timed("quantize", seconds):
            counts = quantize_models(list(onnx_models.values()), how)
        quantized = dataclasses.asdict(how) | counts._asdict()
    report: VerifyReport | None = None
    with staged(output_dir) as stage, ThreadPoolExecutor(1) as reader:  # which makes digests beside everything else
        with timed("write", seconds):
            _save(onnx_models, stage, output_dir)
            described = reader.submit(describe_files, stage, file_names(stage))
            _write_companions(stage, traced, tokenizer)
            flavour.write_files(stage, traced, onnx_models)
            graphs = {name: onnx_model.graph for name, onnx_model in onnx_models.items()}
            positions = logits if flavour.has_last_logits else "all"
            facts = {"adapters": adapters, "precision": precision, "logits": positions}
            manifest = describe(model, graphs, quantization=quantized, **facts)
            manifest |= {} if attention is None else {"attention": dataclasses.asdict(attention)}
            manifest["passes"] = [entry.to_dict() for entry in log.reports]
            write_manifest(stage, manifest, None)
        if verify:
            with timed("verify", seconds):
                report = verify_onnx(stage, model, "full" if verify == "full" else "quick")
        if report is not None and not report.passed:
            raise ExportError(f"the export does not compute what the model does, so it was not written:\n{report}")
        files = described.result()
        files |= describe_files(stage, [name for name in file_names(stage) if name not in files])
        write_manifest(stage, {**manifest, "files": files}, report)
    path = Path(output_dir)
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    return ExportReport(path, sizes, seconds, report, attention, tuple(log.reports))


def _graph_to_translate(traced: TracedModel) -> fx.GraphModule:
    """A copy of a trace's graph in evaluation mode, of PyTorch's operators, each with the value that tracing noted."""
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module))
    set_mode(graph_module.graph, False)
    drop_regions_for_inference(graph_module.graph)
    graph_module.train(False)
    is_noted = all("val" in node.meta for node in graph_module.graph.find_nodes(op="placeholder"))  # pickle leaves it
    if traced.example_inputs.get(PAST) is not None and is_noted:
        return graph_module
    return _as_operators(graph_module, traced)


def _as_operators(graph_module: fx.GraphModule, traced: TracedModel) -> fx.GraphModule:
    """The graph itself where it can be translated, else captured again; a symbolic trace calls modules, for one."""
    if is_operator_graph(graph_module.graph):
        return graph_module
    try:
        return recapture(graph_module, traced.graph_inputs, dynamic=traced.signature.dynamic)
    except Exception as error:  # torch.export raises errors of every type
        raise ExportError(f"the graph cannot be captured as PyTorch's operators: {first_line(error)}") from error


def _save(onnx_models: Mapping[str, ir.Model], stage: Path, output_dir: str | Path) -> None:
    """Write models, each with its weights in a file beside it, if there is room for them."""
    weights = [v.const_value for m in onnx_models.values() for v in m.graph.initializers.values()]
    require_space(output_dir, sum(tensor.nbytes for tensor in weights if tensor is not None))
    for name, onnx_model in onnx_models.items():
        ir.save(
            onnx_model,
            stage / f"{name}.onnx",
            external_data=f"{name}.onnx_data",
            size_threshold_bytes=1024,
            max_workers=_WRITERS,
            max_in_flight_bytes=_IN_FLIGHT,
        )


def _write_companions(stage: Path, traced: TracedModel, tokenizer: Any) -> None:
    """Write `config.json` and the tokenizer's files."""
    if traced.config is not None:
        traced.config.save_pretrained(stage)
        path = stage / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["transformers.js_config"] = {"use_external_data_format": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if traced.generation_config is not None and PAST in traced.example_inputs:
        traced.generation_config.save_pretrained(stage)
    if tokenizer is None:
        return
    if isinstance(tokenizer, (str, Path)):
        loaded = load_tokenizer(tokenizer, ExportError)
        if loaded is None:
            raise ExportError(f"no tokenizer can be loaded from {tokenizer}, which holds none; give its directory")
        tokenizer = loaded
    if not hasattr(tokenizer, "save_pretrained"):
        raise ExportError(f"{tokenizer!r} is no tokenizer; give one of transformers, or the directory of one")
    features = getattr(tokenizer, "feature_extractor", None)
    try:
        tokenizer.save_pretrained(stage)
        if features is not None:
            features.save_pretrained(stage)  # as preprocessor_config.json, which transformers.js reads
    except Exception as error:  # the tokenizers library raises types of its own, for a full disk too
        raise ExportError(f"the tokenizer cannot be saved ({first_line(error)})") from error


def _refuse_unfit(traced: TracedModel, *, verify: bool) -> None:
    if not traced.example_inputs:
        raise ExportError("the trace has no example inputs, which the export runs with; give them to trace()")
    (output,) = traced.graph_module.graph.find_nodes(op="output")
    if not output.all_input_nodes:
        raise ExportError("the model returns no tensor, so there is nothing to export; return one from its forward")
    numbers = [str(node) for node in output.all_input_nodes if not _is_tensor(node)]
    if numbers:
        warn_caller(f"the model returns numbers beside tensors ({', '.join(numbers)}), which the export does not give")
    graph = copy_graph(traced.graph_module)
    set_mode(graph, False)
    if verify and (drawn := draws_randomly(graph)) is not None:
        raise ExportError(
            f"the model draws random numbers in evaluation ({drawn}), so no two runs agree and none can be verified; "
            "make the noise an input of its forward, or export with verify=False"
        )
    precision_of(traced.graph_module)


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor, as far as tracing noted."""
    return "val" not in node.meta or isinstance(node.meta["val"], torch.Tensor)
