"""The next token of a row, chosen from its logits by transformers' processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gralora_fx.serving.sampling import Sampling


class TokenChooser:
    """Chooses the tokens of one answer; its draws depend on its own seed alone, not on other rows."""

    def __init__(self, sampling: Sampling) -> None:
        """Prepare the processors, in the order of transformers' `generate`.

        Args:
            sampling: How tokens are chosen.
        """
        self._processors = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if not sampling.do_sample:
            return
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(int(sampling.seed))
        if sampling.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._processors.append(TopKLogitsWarper(int(sampling.top_k)))
        if sampling.top_p < 1:
            self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, ids: Sequence[int], logits: NDArray[Any]) -> int:
        """The next token.

        Args:
            ids: The prompt and what was chosen since.
            logits: `[vocabulary]`.
        """
        if self._generator is None:
            return int(logits.argmax())
        scores = self._processors(torch.tensor([list(ids)]), torch.from_numpy(logits).float()[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
