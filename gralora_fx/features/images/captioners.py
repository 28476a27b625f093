"""BLIP's captioner as one encoder-decoder from pixels to text, as its `generate` calls its two parts."""

from __future__ import annotations

import copy

import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from gralora_fx.core.tracing.inputs.input_trees import by_own_names
from gralora_fx.errors import TraceError
from gralora_fx.features.images.tasks_and_inputs import TO_TEXT
from gralora_fx.format.input_names import PAST
from gralora_fx.format.tasks import with_past


class BlipForConditionalGeneration(transformers.BlipForConditionalGeneration):  # type: ignore[misc]
    """The captioner of transformers, over the same modules, with the arguments of an encoder-decoder."""

    def forward(
        self,
        pixel_values: Tensor,
        decoder_input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Compute logits `[batch, length, vocabulary]` after decoder ids `[batch, length]`, and the cache."""
        seen = self.vision_model(pixel_values=pixel_values)[0]
        step = {"input_ids": decoder_input_ids, PAST: past_key_values}
        outputs = self.text_decoder(
            **by_own_names(self.text_decoder.forward, step), encoder_hidden_states=seen, use_cache=use_cache
        )
        cache = {name: value for name, value in outputs.items() if isinstance(value, Cache)}
        return Seq2SeqLMOutput(logits=outputs.logits, encoder_last_hidden_state=seen, **cache)


def encoder_decoder_of(model: PreTrainedModel, task: str | None) -> PreTrainedModel:
    """Return a captioner in this form for the task that generates; any other model, or for another task, as it is."""
    if task != with_past(TO_TEXT):
        return model
    if isinstance(model, transformers.BlipForQuestionAnswering):
        raise TraceError(
            "the encoder of BlipForQuestionAnswering reads a question beside pixels, in layers that attend to them; "
            f"{task} traces encoders of pixels alone, or of texts with images in place of tokens, and no task traces it"
        )
    if type(model) is not transformers.BlipForConditionalGeneration:
        return model
    made = copy.copy(model)
    made.__class__ = BlipForConditionalGeneration
    text = model.config.text_config
    special = {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id}
    special["decoder_start_token_id"] = text.bos_token_id
    # `generate` of transformers' class has the decoder's own configuration, with these ids in it
    made.config, made.generation_config = copy.deepcopy((model.config, model.text_decoder.generation_config))
    made.config.is_encoder_decoder = True
    for name, token in special.items():
        setattr(made.config, name, token)
        setattr(made.generation_config, name, token)
    return made
