"""One decoder from a tiny random model to the answers of its export, beside transformers' own generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, merge, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps
from gralora_fx.format.export_directory import MODEL_NAME
from gralora_fx.run.generate.prompt_answers import Scored
from gralora_fx.run.sessions.session import open_session
from gralora_fx.serving import load

NEW_TOKENS = 8
LENGTHS, ANSWER = (
    (15, 4, 7),
    12,
)  # windows of tiny models are smaller than differences between prompts, and than answers
TOLERANCE = 1e-3  # of a log-probability
K = 2
TASK = "text-generation-with-past"
# operators that attend, keep a state or choose among experts; and those that repeat what no operator computes at once
_TELLING = frozenset(
    {
        "Attention",
        "CausalConvWithState",
        "GroupQueryAttention",
        "LinearAttention",
        "Loop",
        "MoE",
        "MultiHeadAttention",
        "Scan",
    }
)


@dataclass(frozen=True)
class Checked:
    """The results of an architecture's export.

    Attributes:
        fused: Attention layers that are one `GroupQueryAttention` each.
        plain: The others, each with the reason.
        equal: Whether every prompt's greedy tokens are the model's.
        sites: Linear layers with adapters.
        answers: How the answers of `generate` to prompts of unequal length differ, given together or alone, from
            transformers'; empty if they do not.
        operators: How often the graph has each operator that attends, keeps a state or chooses among experts.
        cache: What a step keeps, by kind, such as `{"key": 2, "value": 2}`.
        one_length: Why there is no graph whose rows have lengths of their own; empty if there is one.
    """

    fused: int
    plain: dict[str, str]
    equal: bool
    sites: int
    answers: str
    operators: dict[str, int] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    one_length: str = ""

    @property
    def holds(self) -> bool:
        """True if all tokens are the model's."""
        return self.equal and not self.answers


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
        if site.in_features % K == 0 == site.out_features % K
        and model.get_submodule(site.path) is not head
        and site.calls  # a layer whose weight alone is read has an adapter without effect, as in PEFT
        and not site.tied_with  # adapters of two layers cannot be merged into one weight
    }
    options = {"target_modules": paths, "fan_in_fan_out": is_conv1d, "init_weights": False}
    # at PEFT's default of 64 such updates are ten times the weights: logits of PEFT's own Qwen3.5 then change by 3e-4
    # between a row alone and the same one in a batch (see `test_recurrent_layers.py`), and float32 rounds a tenth of
    # those of Kimi-Linear
    config = GraloraConfig(r=4, alpha=8, gralora_k=K, **options)
    adapted = rewrite(traced, config)
    report = export_onnx(adapted, directory, verify="full")
    merged = merge(adapted).tree.parameters
    with torch.no_grad():
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if path in merged:
                parameter.copy_(merged[path])
    session = open_session(directory)
    equal = all(
        _are_the_models(greedy_tokens(DecoderSteps(session, len(ids)), ids, mask), model, ids, mask)
        for ids, mask in prompts(model)
    )
    graph = ir.load(directory / MODEL_NAME).graph
    kept = Counter(str(value.name).split(".")[2] for value in graph.inputs if str(value.name).startswith("past_key_"))
    attention, rows = report.attention, report.rows
    return Checked(
        0 if attention is None else attention.fused,
        {} if attention is None else dict(attention.plain),
        equal,
        len(traced.sites),
        differing_answers(model, directory),
        operators=dict(Counter(node.op_type for node in graph.all_nodes() if node.op_type in _TELLING)),
        cache=dict(kept),
        one_length=(rows.reason if rows is not None else None) or "",
    )


def greedy_tokens(step: DecoderSteps, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the new tokens of a batch padded on the left, as a plain session gives them."""
    outputs: list[Tensor] = []
    for _ in range(NEW_TOKENS):
        ids = step(ids, mask)[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        outputs.append(ids)
    return torch.cat(outputs, dim=1)


def differing_answers(model: PreTrainedModel, directory: Path) -> str:
    """Describe where an export's answers differ from transformers', which reads each prompt alone; "" if nowhere.

    Args:
        model: The model, with the export's weights.
        directory: The export.
    """
    served = load(directory, threads=1)
    ends = served.limits.ends
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, size - 1, (length,), generator=generator).tolist() for length in LENGTHS]
    texts.append([*texts[1][:-1], size - 1])  # the token that pads rows
    expected = [alone(model, text, ends) for text in texts]
    together = served.generate(texts, max_new_tokens=ANSWER, logprobs=0)
    singly = [served.generate(text, max_new_tokens=ANSWER, logprobs=0) for text in texts]
    problems = []
    for how, answers in (("together", together), ("alone", singly)):
        for text, answer, reference in zip(texts, answers, expected, strict=True):
            if problem := _difference(answer, reference):
                problems.append(f"{len(text)} tokens {how}: {problem}")
    return "; ".join(problems)


def alone(model: PreTrainedModel, text: list[int], ends: frozenset[int]) -> tuple[list[int], list[float]]:
    """Tokens by transformers up to one that ends an answer, and the log-probability of each."""
    _end_nowhere(model)
    ids = torch.tensor([text])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[0, len(text) :].tolist()
    tokens = tokens[: next((place for place, token in enumerate(tokens) if token in ends), None)]
    return tokens, [float(row[0].log_softmax(-1)[token]) for row, token in zip(result.logits, tokens, strict=False)]


def _difference(answer: Scored, reference: tuple[list[int], list[float]]) -> str:
    tokens, scores = reference
    if answer.content != tokens:
        return f"{answer.content} instead of {tokens}"
    gap = max((abs(score.logprob - other) for score, other in zip(answer.scores, scores, strict=True)), default=0.0)
    return f"a log-probability differs by {gap:.1e}" if gap > TOLERANCE else ""


def prompts(model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a batch of prompts of unequal length, padded on the left, and a single one."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(2)
    for lengths in ((9, 4, 6), (7,)):
        ids = torch.randint(4, size - 1, (len(lengths), max(lengths)), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            mask[row, : max(lengths) - length] = 0
        yield ids, mask


def _are_the_models(tokens: Tensor, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether tokens are a model's: of all prompts at once, or of each alone where padding is not neutral."""
    if torch.equal(tokens, generated(model, ids, mask)):
        return True
    rows = zip(ids, mask.bool(), strict=True)
    alone = [generated(model, row[real][None], torch.ones_like(row[real][None])) for row, real in rows]
    return torch.equal(tokens, torch.cat(alone))


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """`[batch, NEW_TOKENS]` by transformers."""
    _end_nowhere(model)
    result = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return result[:, ids.shape[1] :]


def _end_nowhere(model: PreTrainedModel) -> None:
    """Let transformers go on after tokens that would end an answer."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
