"""What is compared of a kind of export: inputs, prompts, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gralora_fx.engine.adapters import Adapters
from gralora_fx.exporters.reports import TensorCheck, TokenCheck
from gralora_fx.exporters.verification.float64_reference import ToleranceCheck
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.tracing.traced_model import TracedModel

Case = tuple[str, Mapping[str, Any]]  # a description, and inputs by name


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
    """What greedy tokens are compared of.

    Attributes:
        session: The export.
        model: The model that it is compared with, in evaluation mode.
        cases: The inputs that were compared before.
        prompts: Prompts to begin with.
        tolerance_check: Decides which differences of the logits are acceptable.
        quick: Whether few tokens are enough.
        adapters: The export's adapters.
        rows: Its graph whose rows have adapters, and those of a decoder lengths, of their own: of a decoder what
            makes a `Step` of prompts, else a session; None for none.
    """

    session: Any
    model: TracedModel | GraloraModel
    cases: Sequence[Case]
    prompts: Sequence[PromptBatch]
    tolerance_check: ToleranceCheck
    quick: bool
    adapters: Adapters
    rows: Any = None


@dataclass(frozen=True)
class TokenResult:
    """How greedy tokens compare.

    Attributes:
        passed: Whether they are close enough.
        tokens: The report of each step.
        tensors: What is said of them as of an output.
        rows: The report of each step of the graph whose rows have lengths of their own.
    """

    passed: bool = True
    tokens: TokenCheck | None = None
    tensors: tuple[TensorCheck, ...] = ()
    rows: TokenCheck | None = None


def _compare_none(run: TokenRun) -> TokenResult:
    """A model without a cache is not run step by step."""
    return TokenResult()


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
    compare_tokens: Callable[[TokenRun], TokenResult] = _compare_none

    def cases(self, model: TracedModel, seed: int, *, quick: bool) -> list[Case]:
        """Fresh inputs with the constants that a call of the model gives again.

        Args:
            model: A traced model with example inputs.
            seed: Seed of the random values.
            quick: Whether a few short ones are enough.
        """
        drawn = self.inputs(model, torch.Generator().manual_seed(seed), quick)
        return [(description, {**model.constants, **case}) for description, case in drawn]
