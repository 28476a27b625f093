"""What is compared of a kind of export: inputs, prompts, greedy tokens; and random values of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.translation.names import AXES
from gralora_fx.exporters.verify.tolerances import ToleranceCheck
from gralora_fx.exporters.verify_report import TensorCheck, TokenCheck
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.limits import context_length

Case = tuple[str, Mapping[str, Any]]  # a description, and inputs by name
LENGTHS = (1, 6, 11, 24)  # of texts


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts.

    Attributes:
        description: What they are.
        ids: `[batch, length]`.
        mask: `[batch, length]`, 0 where a position is padding.
        steps: How many tokens to compare.
    """

    description: str
    ids: Tensor
    mask: Tensor
    steps: int


@dataclass(frozen=True)
class TokenRun:
    """An export and the model that its greedy tokens are compared with, after their outputs."""

    session: Any
    model: TracedModel | GraloraModel  # in evaluation mode
    cases: Sequence[Case]  # the inputs that were compared before
    prompts: Sequence[PromptBatch]
    tolerance_check: ToleranceCheck
    quick: bool
    adapters: Adapters
    rows: Any = None  # see `Variant`


@dataclass(frozen=True)
class TokenResult:
    """How greedy tokens compare, those of `model.onnx` and of the graph of rows; nothing of a model without a cache."""

    passed: bool = True
    tokens: TokenCheck | None = None
    tensors: tuple[TensorCheck, ...] = ()  # what is said as of an output
    rows: TokenCheck | None = None


@dataclass(frozen=True)
class Verification:
    """What is compared of a kind of export.

    Attributes:
        inputs: Gives fresh inputs of a trace by a generator of random numbers, few where that is enough.
        prompts: Gives prompts of a trace by a seed, few where that is enough; None for a kind that takes none.
        compare_tokens: Compares greedy tokens.
    """

    inputs: Callable[[TracedModel, torch.Generator, bool], Iterator[Case]]
    prompts: Callable[[TracedModel, int, bool], Iterator[PromptBatch]] | None = None
    compare_tokens: Callable[[TokenRun], TokenResult] = lambda _: TokenResult()

    def cases(self, model: TracedModel, seed: int, *, quick: bool) -> list[Case]:
        """Fresh inputs with the constants that a call of the model gives again."""
        drawn = self.inputs(model, torch.Generator().manual_seed(seed), quick)
        return [(description, {**model.constants, **case}) for description, case in drawn]


def context_of(model: TracedModel) -> int | None:
    """Context length of a model, less two for models whose positions begin at two; None without a limit."""
    config = {} if model.config is None else model.config.get_text_config().to_dict()
    limits = [context_length(config, name) for name in ("input_ids", "decoder_input_ids")]
    known = [limit for limit in limits if limit is not None]
    return max(1, min(known) - 2) if known else None


def vocabulary_of(model: TracedModel) -> int | None:
    """Vocabulary size of a model; None if its configuration does not say."""
    config = None if model.config is None else model.config.get_text_config()
    return getattr(config, "vocab_size", None)


def longest_text(model: TracedModel) -> int:
    """How many positions a text may have: the context, or 24 where that has no limit."""
    return context_of(model) or max(LENGTHS)


def is_text(name: str) -> bool:
    """Whether the second axis of an input is positions of a text."""
    return AXES.get(name, ())[1:2] in (("sequence_length",), ("decoder_sequence_length",))


def text_like(
    name: str, value: Tensor, model: TracedModel, batch: int, length: int, generator: torch.Generator
) -> Tensor:
    """Random values for an input of a text, with another batch and length; of another input with another batch."""
    if not is_text(name):
        return like(value, batch, None, generator)
    if name.endswith("attention_mask"):
        return torch.ones(batch, length, dtype=value.dtype)
    if name == "position_ids":
        return torch.arange(length, dtype=value.dtype).expand(batch, length).contiguous()
    if name == "token_type_ids":
        return torch.zeros(batch, length, dtype=value.dtype)
    ids = like(value, batch, length, generator, vocabulary_of(model))
    end = getattr(model.config, "eos_token_id", None)
    if name.endswith("input_ids") and isinstance(end, int) and 0 <= end < (vocabulary_of(model) or 0):
        ids[ids == end] = 1 if end != 1 else 0  # models that pool at the end token need one in every row
        ids[:, -1] = end
    return ids


def like(
    value: Tensor, batch: int, length: int | None, generator: torch.Generator, vocabulary: int | None = None
) -> Tensor:
    """Random values like a tensor's, with another batch size and, if given, another length."""
    if value.ndim == 0:
        return value
    shape = [batch, *value.shape[1:]]
    if length is not None and value.ndim > 1:
        shape[1] = length
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    if value.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    low, high = min(3, (vocabulary or 4) - 1), vocabulary or int(value.max().item()) + 1
    return torch.randint(min(low, max(high - 1, 0)), max(high, 1), shape, generator=generator).to(value.dtype)


def pad(case: dict[str, Any], side: str) -> None:
    """Mask a different number of positions in every row but the first.

    The tokens there are the row's smallest, so that a model that pools at the largest, as CLIP does, reads no padding.
    The last stays, which ends the text for models that pool there.
    """
    for name, mask in case.items():
        if name == "attention_mask":
            for row in range(1, mask.shape[0]):
                hidden = min(row, mask.shape[1] - 1)
                masked = slice(0, hidden) if side == "left" else slice(mask.shape[1] - hidden, None)
                mask[row, masked] = 0
                ids = case.get("input_ids")
                if isinstance(ids, Tensor) and ids.shape == mask.shape and hidden:
                    ids[row, :-1][masked] = ids[row, :-1].min()
