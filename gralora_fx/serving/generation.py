"""How an export with a cache generates: what reads its prompts, and what steps its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.serving.answers import OpenDecoder
from gralora_fx.serving.encoder_inputs import EncoderInputs
from gralora_fx.serving.prompts import Prompts, given_prompts
from gralora_fx.serving.source_prompts import Adapter, SourceOptions, SourcePrompts


@dataclass(frozen=True)
class Generation:
    """How an export generates.

    Attributes:
        limits: What a row can take.
        open_decoder: Makes the model as rows; arguments and errors as of `Decoder`.
        encoder_inputs: Reads what the encoder of an encoder-decoder takes; None for a decoder.
    """

    limits: DecoderLimits
    open_decoder: OpenDecoder
    encoder_inputs: EncoderInputs | None = None

    def prompts(
        self,
        prompts: Any,
        input_ids: Any,
        attention_mask: Any,
        options: SourceOptions,
        adapter: Adapter,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Prompts:
        """What `generate` was given, read.

        Args:
            prompts: Its prompts, or None.
            input_ids: A tokenizer's result, or None.
            attention_mask: The mask of that, or of features, or None.
            options: What only an encoder-decoder takes.
            adapter: The adapter of all prompts, or of each.
            tokenizer: The tokenizer beside the model, or None.

        Raises:
            ServingError: It is not what the model reads, or an option has no effect.
        """
        if self.encoder_inputs is None:
            options.check_unused("the model is a decoder, without an encoder")
            return given_prompts(prompts, input_ids, attention_mask, tokenizer)
        reader = SourcePrompts(self.encoder_inputs, self.limits, tokenizer, self.open_decoder)
        return reader.read(prompts, input_ids, attention_mask, options, adapter)
