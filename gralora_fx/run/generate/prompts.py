"""Prompts of `generate`: texts, chats or token ids, one or several, or a tokenizer's result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from gralora_fx.base.tensors import is_tensor
from gralora_fx.core.loading.tokenizers import is_chat, is_ids, prompt_ids
from gralora_fx.errors import ServingError, first_line
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.limits import PromptLimit

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer
    from gralora_fx.run.engine.adapters import AdapterNames
    from gralora_fx.run.engine.decoder import Decoder
    from gralora_fx.run.engine.limits import DecoderSize
    from gralora_fx.run.generate.answer_options import AnswerStart, Sampling
    from gralora_fx.run.generate.generation_rules import GenerationRules

SAMPLES, RATE = "array", "sampling_rate"  # fields of a signal, as the datasets package names them


@dataclass(frozen=True)
class EncoderInput:
    """The encoder's input for an answer, and the model's rules for it."""

    arrays: Source  # the encoder's inputs by name, each `[1, ...]`
    rules: GenerationRules  # the model's generation rules
    ids: tuple[int, ...] | None = None  # its token ids; None for features
    forced_first: int | None = None  # the answer's first token; None for the model's, if it has one

    def processors(self, sampling: Sampling, prompt: Sequence[int], new_tokens: int) -> list[Any]:
        """Return the rules for the answer's logits (see `GenerationRules.processors`)."""
        return self.rules.processors(sampling, prompt, new_tokens, self.ids, self.forced_first)


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids."""

    rows: list[list[int]]  # the ids of each, unpadded: the decoder's tokens before the answer
    is_single: bool  # whether one prompt was given, rather than a list
    gives_text: bool  # whether the answers are texts, rather than ids
    sources: Sequence[EncoderInput] = ()  # encoder inputs of each, for an encoder-decoder; empty for a decoder
    # tensors, by name, that replace tokens of each, for a decoder; empty for text alone
    given: Sequence[Source | None] = ()

    @property
    def new_tokens(self) -> list[int | None]:
        """The model's maximum tokens of each answer, if it sets one; empty for a decoder."""
        return [source.rules.new_tokens(len(self.rows[index])) for index, source in enumerate(self.sources)]


@dataclass(frozen=True)
class GenerateInputs:
    """The prompt arguments of `generate`."""

    prompts: Any = None  # one prompt, or several of them
    input_ids: Any = None  # instead of prompts, a tokenizer's result
    attention_mask: Any = None  # the mask of `input_ids` or of features
    # by name, what a feature extractor made for an encoder, each `[batch, ...]`
    features: Mapping[str, Any] = field(default_factory=dict)
    inputs_embeds: Any = None  # embeddings that replace a decoder's tokens, of one prompt or of each
    media: Any = None  # inputs of a prompt, or each of them, beside its text, for the export's companions

    def check_unused(self, reason: str, name: str) -> None:
        """Raise a `ServingError` with the reason if an input without effect is given; features by their names."""
        value = getattr(self, name)
        for given in value if name == "features" else [] if value is None else [name]:
            raise ServingError(f"{given} has no effect: {reason}; leave it out")

    def read(self, tokenizer: TextTokenizer | None, limit: PromptLimit | None = None) -> Prompts:
        """Convert prompts, or a tokenizer's result, to token ids."""
        if self.input_ids is None:
            if self.prompts is None or self.attention_mask is not None:
                raise ServingError("give prompts, or input_ids and attention_mask as generate(**tokenizer(...)) does")
            return read_prompts(self.prompts, tokenizer, limit)
        if self.prompts is not None:
            raise ServingError("prompts and input_ids are both given; give one of them")
        return read_tokenized(self.input_ids, self.attention_mask)


@dataclass(frozen=True)
class AnswerCall:
    """A call of `generate`, beside its inputs."""

    start: AnswerStart
    adapter: AdapterNames
    tokenizer: TextTokenizer | None
    open_decoder: Callable[[DecoderSize], Decoder]  # see `Generation`


def read_prompts(prompts: Any, tokenizer: TextTokenizer | None, limit: PromptLimit | None = None) -> Prompts:
    """Convert the prompts of `generate` to token ids."""
    if isinstance(prompts, Mapping):
        raise ServingError("pass a tokenizer's result by name: generate(**tokenizer(...))")
    is_single = isinstance(prompts, str) or is_chat(prompts) or is_ids(prompts)
    if is_single:
        items = [prompts]
    elif isinstance(prompts, (bytes, bytearray, set, frozenset)) or not isinstance(prompts, Iterable):
        raise ServingError(
            f"prompts are a text, a list of messages, a list of token ids or a list of these, but got {prompts!r:.80}"
        )
    else:
        items = list(_rows(prompts))
    check = None if limit is None else limit.check_text
    rows = [prompt_ids(prompt, tokenizer, ServingError, check=check) for prompt in items]
    return Prompts(rows, is_single, gives_text=not any(is_ids(prompt) for prompt in items))


def read_tokenized(input_ids: Any, attention_mask: Any) -> Prompts:
    """Convert a tokenizer's result to prompts: tensors, arrays or lists, padded on either side or not at all.

    Args:
        input_ids: `[batch, length]`, or `[length]` for one prompt; rows of lists may differ in length.
        attention_mask: Like `input_ids`, 0 at padding; None without padding.
    """
    ids = _as_lists("input_ids", input_ids)
    is_single = not any(isinstance(row, list) for row in ids)
    rows = [ids] if is_single and ids else ids
    if attention_mask is None:
        masks: list[Any] = [[1] * len(row) for row in rows if isinstance(row, list)]
    else:
        masks = _as_lists("attention_mask", attention_mask)
        masks = [masks] if is_single and masks else masks
    if not all(is_ids(row) or row == [] for row in rows):
        raise ServingError(f"input_ids must be whole numbers of one or two axes, but got {input_ids!r:.80}")
    sizes = [len(row) for row in rows]
    if [len(mask) if isinstance(mask, list) else None for mask in masks] != sizes:
        raise ServingError(f"attention_mask must have the shape of input_ids, rows of {sizes!r:.80}")
    if any(value not in (0, 1) or not isinstance(value, int) for mask in masks for value in mask):
        raise ServingError("attention_mask must be 1 where a position counts and 0 where it is padding")
    unpadded = [
        [token for token, counts in zip(*pair, strict=True) if counts] for pair in zip(rows, masks, strict=True)
    ]
    return Prompts(unpadded, is_single and bool(ids), gives_text=False)


def is_signal(value: Any) -> bool:
    """Return whether a prompt is a signal: single-channel samples, or a dict of them with their rate."""
    if isinstance(value, Mapping):
        return SAMPLES in value and RATE in value
    array = np.asarray(value) if isinstance(value, (list, tuple)) and value and _is_float(value[0]) else value
    kind = str(getattr(array, "dtype", "")).rpartition(".")[2]
    return getattr(array, "ndim", None) == 1 and kind.startswith(("float", "bfloat"))


def _is_float(value: Any) -> bool:
    return isinstance(value, (float, np.floating))


def _is_array(value: object) -> TypeGuard[Any]:
    return isinstance(value, np.ndarray) or is_tensor(value)


def _rows(prompts: Iterable[Any]) -> Iterable[Any]:
    """Return the prompts of a batch."""
    if not _is_array(prompts):
        return prompts
    if prompts.ndim not in (1, 2) or getattr(prompts, "is_meta", False):
        raise ServingError(f"token ids have one or two axes and values, but got {prompts!r:.80}")
    return prompts if prompts.ndim == 2 else _as_lists("prompts", prompts)


def _as_lists(name: str, value: Any) -> list[Any]:
    """Convert a tensor, an array or a list of them to nested lists."""
    try:
        if _is_array(value):
            value = value.tolist()
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return [row.tolist() if _is_array(row) or isinstance(row, np.generic) else row for row in value]
    except Exception as error:  # tensors without values raise what they like
        raise ServingError(f"{name} cannot be read ({first_line(error)}); give a tensor, an array or lists") from error
    raise ServingError(f"{name} must be a tensor, an array or lists, but got {value!r:.80}")
