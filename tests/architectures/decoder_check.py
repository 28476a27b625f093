"""One decoder from a tiny random model to greedy tokens of its export, beside transformers' own generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, merge, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.runtime.decoder_steps import DecoderSteps, greedy_tokens
from gralora_fx.runtime.session import open_session

NEW_TOKENS = 8
K = 2
TASK = "text-generation-with-past"


@dataclass(frozen=True)
class Checked:
    """What an architecture's export gave.

    Attributes:
        fused: Attention layers that are one `GroupQueryAttention` each.
        plain: The others, each with the reason.
        equal: Whether every prompt's greedy tokens are the model's.
        sites: Linear layers with adapters.
    """

    fused: int
    plain: dict[str, str]
    equal: bool
    sites: int


def check_decoder(model: PreTrainedModel, directory: Path) -> Checked:
    """Trace, rewrite, export with verification, and compare greedy tokens over prompts.

    The reference is transformers' `generate` with the source model, whose weights are the folded ones: no graph.

    Args:
        model: A decoder; its weights have the adapters folded in afterwards.
        directory: Where to export to.

    Raises:
        GraloraError: A step fails.
    """
    torch.manual_seed(1)
    traced = trace(model, task=TASK)
    is_conv1d = any(site.kind == "conv1d" for site in traced.sites)
    head = model.get_output_embeddings()
    paths = {
        site.path
        for site in traced.sites
        if site.in_features % K == 0 == site.out_features % K and model.get_submodule(site.path) is not head
    }
    config = GraloraConfig(r=4, gralora_k=K, target_modules=paths, init_weights=False, fan_in_fan_out=is_conv1d)
    adapted = rewrite(traced, config)
    report = export_onnx(adapted, directory, verify="full")
    merged = merge(adapted).tree.parameters
    with torch.no_grad():
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if path in merged:
                parameter.copy_(merged[path])
    session = open_session(directory)
    equal = all(
        torch.equal(greedy_tokens(DecoderSteps(session, len(ids)), ids, NEW_TOKENS, mask), generated(model, ids, mask))
        for ids, mask in prompts(model)
    )
    assert report.attention is not None
    return Checked(report.attention.fused, dict(report.attention.plain), equal, len(traced.sites))


def prompts(model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch of prompts of unequal length, padded on the left, and a single one."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(2)
    for lengths in ((9, 4, 6), (7,)):
        ids = torch.randint(4, size - 1, (len(lengths), max(lengths)), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            mask[row, : max(lengths) - length] = 0
        yield ids, mask


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """`[batch, NEW_TOKENS]` by transformers."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    result = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return result[:, ids.shape[1] :]
