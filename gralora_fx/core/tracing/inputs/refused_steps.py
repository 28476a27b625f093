"""Decoders of transformers whose step is not a graph of new tokens and a cache, by name, each with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gralora_fx.errors import TraceError, option

if TYPE_CHECKING:  # imports much that serving does not need
    from transformers import PreTrainedModel

_WITHOUT = f"{option(task='text-generation')} traces it without a cache"
_ONE_LENGTH = f"{option(task='text-generation')} traces it for texts of one length, from Python with dynamic=False"
_NOTHING = "no task traces it"
# by the configuration's `model_type`: why, and what to do
_REFUSED = {
    "blt": ("it reads patches of bytes, whose lengths the entropies of another model decide", _NOTHING),
    "cpmant": ("every step is given the whole text, before which it puts a prompt of its own", _NOTHING),
    "deepseek_v4": (
        "its layers keep averages of windows of tokens, and what the last window lacks",
        "use transformers",
    ),
    "gemma4_assistant": ("it reads the keys and values of the model that it drafts for, and keeps none", _NOTHING),
    "gemma4_unified_assistant": ("it reads the keys and values of the model that it drafts for", _NOTHING),
    "musicgen_decoder": ("each text of it is several rows of codes of sound, which are embedded as one", _NOTHING),
    "musicgen_melody_decoder": ("each text of it is several rows of codes of sound, embedded as one", _NOTHING),
    "openai-gpt": ("its forward takes no cache, so that every step reads the whole text", _WITHOUT),
    "prophetnet": ("after a cache it reads one token at a time, by another computation than a prompt's", _WITHOUT),
    "recurrent_gemma": ("what it keeps of a text is in its modules, and prompts have another computation", _ONE_LENGTH),
    "reformer": ("its cache is of hidden states, which random hashes sort into buckets", _NOTHING),
    "rwkv": ("its states are a list of its own, and its forward loops over tokens", _ONE_LENGTH),
    "xlm": ("it generates at a mask token behind the text, and returns no cache", _WITHOUT),
    "xlstm": ("its states are in a cache of its own, which it writes over, and it reads prompts in chunks", _NOTHING),
    "xlnet": ("it generates at a mask token behind the text, and its memory is hidden states (mems)", _WITHOUT),
}


class NoStepError(TraceError):
    """A decoder has no step that a graph can hold; the message says what traces it, if anything does."""


def check_has_step(model: PreTrainedModel) -> None:
    """Check that a decoder's step takes new tokens and a cache, and gives logits and the cache's next state."""
    refused = _REFUSED.get(model.config.model_type)
    if getattr(model.config.get_text_config(), "ple_layer_ids", None):
        refused = "its embeddings of n-grams (ple_layer_ids) begin with end tokens, and states with zeros", _NOTHING
    if refused is not None:
        why, remedy = refused
        raise NoStepError(f"{type(model).__name__} has no step with a cache that a graph can hold: {why}; {remedy}")
