"""Generation with a batched decoder: each prompt is a row with its own adapter, its cache a shared buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError
from gralora_fx.runtime.adapter_stack import row_ids
from gralora_fx.runtime.batched_steps import BatchedSteps
from gralora_fx.runtime.context_length import context_length
from gralora_fx.serving.decoder_limits import DecoderLimits
from gralora_fx.serving.end_tokens import end_tokens
from gralora_fx.serving.row_adapters import RowAdapters
from gralora_fx.serving.token_choice import Choice, TokenChooser

_CHUNK = 64  # tokens of each prompt in a step


class BatchedPrompts:
    """A batched decoder whose prompts are given together.

    Attributes:
        limits: What it can take.
    """

    def __init__(
        self, session: Any, adapters: RowAdapters, directory: Path, config: Mapping[str, Any], position_offset: int
    ) -> None:
        """Read what the decoder can take.

        Args:
            session: A session over the decoder.
            adapters: The adapters that rows choose among.
            directory: The export directory.
            config: Fields of the model's `config.json`.
            position_offset: By how many positions the model has fewer than that says.

        Raises:
            ServingError: The configuration names no context length, or its end tokens are not ids.
        """
        context = context_length(config)
        if context is None:
            raise ServingError(f"config.json of {directory} names no context length; export a model whose does")
        text = config.get("text_config") or config
        ends = end_tokens(directory, config)
        self.limits = DecoderLimits(text.get("vocab_size"), context - position_offset, ends)
        self._session, self._adapters = session, adapters

    def rows(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, adapter: str | Sequence[str | None] | None = None
    ) -> BatchedRows:
        """Read prompts as one batch.

        Args:
            prompts: Token ids of each, within the limits.
            new_tokens: The most tokens that a row may add.
            adapter: The adapter of all rows, or of each; None for the base.

        Raises:
            ServingError: An adapter is not there, there are not as many as rows, or ONNX Runtime fails.
        """
        return BatchedRows(self._session, self._adapters, prompts, adapter, new_tokens=new_tokens)


class BatchedRows:
    """Prompts in the rows of a batched decoder; a row that is over is idle."""

    def __init__(
        self,
        session: Any,
        adapters: RowAdapters,
        prompts: Sequence[Sequence[int]],
        adapter: str | Sequence[str | None] | None,
        *,
        new_tokens: int,
    ) -> None:
        """Read the prompts.

        Args:
            session: A session over the decoder.
            adapters: The adapters that rows choose among.
            prompts: Token ids by row, checked.
            adapter: The adapter of all rows, or of each; None for the base.
            new_tokens: The most tokens that a row may add.

        Raises:
            ServingError: An adapter is not there, there are not as many as rows, or ONNX Runtime fails.
        """
        self._stack = adapters.stack(adapter)
        self._adapter_ids = row_ids(self._stack, adapter, len(prompts))
        longest = max(map(len, prompts))
        chunk = min(longest, _CHUNK)
        self._steps = BatchedSteps(session, rows=len(prompts), capacity=longest + new_tokens, chunk=chunk)
        self._past = np.zeros(len(prompts), dtype=np.int32)
        self._logits: dict[int, NDArray[Any]] = {}
        self._pending: dict[int, int] = {}
        for start in range(0, longest, chunk):
            parts = {row: prompt[start : start + chunk] for row, prompt in enumerate(prompts)}
            self._read({row: part for row, part in parts.items() if part})

    def step(self, choosers: Mapping[int, TokenChooser]) -> dict[int, Choice]:
        """Choose the next token of some rows.

        Args:
            choosers: Of each row that goes on, what chooses its tokens. A row that is left out is over.

        Raises:
            ServingError: ONNX Runtime fails.
        """
        if self._pending:
            self._read({row: [token] for row, token in self._pending.items() if row in choosers})
        choices = {row: choose(self._logits[row]) for row, choose in choosers.items()}
        self._pending = {row: choice.token for row, choice in choices.items()}
        return choices

    def _read(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Let rows read tokens, and keep the logits after the last of each."""
        ids = np.zeros((len(self._past), max(map(len, tokens.values()))), dtype=np.int64)
        query = np.zeros_like(self._past)
        for row, given in tokens.items():
            ids[row, : len(given)], query[row] = given, len(given)
        logits = self._steps(ids, query, self._past, self._adapter_ids, self._stack.values).numpy()
        self._past += query
        for row, given in tokens.items():
            self._logits[row] = logits[row, min(len(given), logits.shape[1]) - 1].copy()
