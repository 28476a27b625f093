"""One encoder from a tiny random model to an export that gives its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace
from gralora_fx.core.adapters.folded_weights import shared_sites
from gralora_fx.core.tracing.check import eager_failure
from gralora_fx.core.tracing.draft import configured_cache
from gralora_fx.core.tracing.inputs.samples import infer_task, inputs_for_task
from gralora_fx.exporters import export_onnx, verify_onnx

K = 2
_BETWEEN = ("Cast", "Reshape", "Slice", "Where", "Mul", "Transpose")  # what a model may do to attention's weights
STAGES = ("build", "run", "trace", "rewrite", "export", "hold")


@dataclass(frozen=True)
class Checked:
    """The results of a class's export.

    Attributes:
        sites: Linear layers with adapters.
        fused: Attention layers that are one operator each.
        plain: The others, each with the reason.
        uses_interface: Whether its attention goes through transformers' interface.
        nan_checks: `IsNaN` nodes in the export.
        difference: How its outputs differ from the model's, or an empty string.
    """

    sites: int
    fused: int
    plain: dict[str, str]
    uses_interface: bool
    nan_checks: int
    difference: str

    @property
    def holds(self) -> bool:
        """True if its outputs are the model's."""
        return not self.difference


def check_encoder(
    model: PreTrainedModel, task: str | None, directory: Path, note: Callable[[str], None] = lambda stage: None
) -> Checked:
    """Trace, rewrite, export, and compare with the model on other sizes.

    Args:
        model: An encoder.
        task: Its task; None for the one that its class has.
        directory: Where to export to.
        note: Is told each stage as it begins.

    Raises:
        GraloraError: A step fails.
        RuntimeError: The model itself fails on the inputs of its task, so that there is nothing to trace.
    """
    torch.manual_seed(1)
    note("run")
    _run(model, task or infer_task(model))
    note("trace")
    traced = trace(model, task=task)
    note("rewrite")
    adapted = _rewritten(traced, model)
    note("export")
    report = export_onnx(adapted, directory, verify=False)
    note("hold")
    verification = verify_onnx(directory, adapted, "quick")
    attention = report.attention
    plain = {} if attention is None else dict(attention.plain)
    nodes = onnx.load(directory / "model.onnx", load_external_data=False).graph.node
    for name in _weighted_sums(nodes)[len(plain) :]:
        plain[name] = "its softmax was not recognised as attention's"
    return Checked(
        sites=len(traced.sites),
        fused=0 if attention is None else attention.fused,
        plain=plain,
        uses_interface=any(
            isinstance(part, PreTrainedModel) and part._can_set_attn_implementation() for part in model.modules()
        ),
        nan_checks=sum(node.op_type == "IsNaN" for node in nodes),
        difference="" if verification.passed else _difference(verification.tensors),
    )


def _run(model: PreTrainedModel, task: str) -> None:
    """Run a model on the inputs of its task, as a trace would."""
    inputs = inputs_for_task(model, task)
    with configured_cache(model, use_cache=False):
        failure = eager_failure(model, inputs)
    if failure is not None:
        raise RuntimeError(f"on {', '.join(inputs)} alone the model itself fails: {failure}")


def _rewritten(traced: TracedModel, model: PreTrainedModel) -> GraloraModel | TracedModel:
    """Return the trace with adapters on all linear layers but shared weights; the trace itself where there are none."""
    head = model.get_output_embeddings()
    shared = shared_sites(traced.graph_module, traced.sites)
    paths = {
        site.path
        for site in traced.sites
        if site.in_features % K == 0 == site.out_features % K
        and site.path not in shared
        and model.get_submodule(site.path) is not head
    }
    if not paths:
        return traced
    is_conv1d = all(site.kind == "conv1d" for site in traced.sites if site.path in paths)
    config = GraloraConfig(r=4, gralora_k=K, target_modules=paths, init_weights=False, fan_in_fan_out=is_conv1d)
    return rewrite(traced, config)


def _weighted_sums(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Return the softmaxes whose result is the first operand of a product: attention in several operators."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def ends(value: str) -> bool:
        for node in readers.get(value, ()):
            if node.op_type == "MatMul" and node.input[0] == value:
                return True
            if node.op_type in _BETWEEN and any(map(ends, node.output)):
                return True
        return False

    return [node.name for node in nodes if node.op_type == "Softmax" and ends(node.output[0])]


def _difference(tensors: object) -> str:
    assert isinstance(tensors, tuple)
    worst = max(tensors, key=lambda check: check.max_rel_error)
    return f"{worst.name} differs by {worst.max_abs_error:.1e}, relative to the largest value {worst.max_rel_error:.1e}"
