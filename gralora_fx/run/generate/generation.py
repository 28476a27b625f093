"""How an export with a cache generates: what its prompts are for encoder and decoder, and what steps its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from gralora_fx.format.input_names import EMBEDS
from gralora_fx.run.engine.adapters import AdapterNames
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize, PromptLimit
from gralora_fx.run.generate.answer_options import AnswerOptions
from gralora_fx.run.generate.prompts import GenerateInputs, Prompts
from gralora_fx.run.generate.speculation import Speculation

if TYPE_CHECKING:
    from gralora_fx.run.generate.encoder_inputs import EncoderInputs


@dataclass(frozen=True)
class Generation:
    """How an export generates.

    Attributes:
        limits: What a row can take.
        open_decoder: Makes the model as rows of a size; errors as of `Decoder`.
        encoder_inputs: Reads what the encoder of an encoder-decoder takes; None for a decoder.
        speculation: Chooses the lengths of drafts, by what calls before have measured.
    """

    limits: DecoderLimits
    open_decoder: Callable[[DecoderSize], Decoder]
    encoder_inputs: EncoderInputs | None = None
    speculation: Speculation = field(default_factory=Speculation)

    def read(
        self,
        inputs: GenerateInputs,
        options: AnswerOptions,
        adapter: AdapterNames,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Prompts:
        """Read what `generate` was given as what encoder and decoder read."""
        reader = self.encoder_inputs
        if reader is None:
            reason = "the model is a decoder, without an encoder"
            inputs.check_unused(reason, "input_features")
            if options.start is not None:
                options.start.check_unused(reason, "language", "task", "forced_bos_token_id")
            texts = inputs.read(tokenizer, PromptLimit.of_context(self.limits))
            return texts if inputs.inputs_embeds is None else _with_embeddings(texts, inputs)
        inputs.check_unused("an encoder-decoder's encoder reads what it answers", EMBEDS)
        from gralora_fx.run.generate.encoder_inputs import AnswerStart

        return reader.read(inputs, options.start or AnswerStart(), adapter, tokenizer, self.open_decoder)


def _with_embeddings(texts: Prompts, inputs: GenerateInputs) -> Prompts:
    """Return prompts with what stands in the place of their tokens, as a feature reads it."""
    from gralora_fx.base.features import parts

    readers = parts("given prompts", (EMBEDS,))
    if not readers:
        inputs.check_unused("no feature that is installed reads it", EMBEDS)
    given: Prompts = readers[0](texts, inputs.inputs_embeds)
    return given
