"""A model with a cache: fresh inputs of first and later steps, and prompts whose greedy tokens are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.errors import ExportError
from gralora_fx.exporters.verification.cases import (
    PromptBatch,
    context_of,
    like,
    longest_text,
    pad,
    text_like,
    vocabulary_of,
)
from gralora_fx.loading.tokenizers import load_tokenizer, prompt_ids
from gralora_fx.tracing.inputs.cache import PAST, decoder_cache, empty_cache, pairs_of, positions, returned_cache
from gralora_fx.tracing.traced_model import TracedModel

# rows, positions before, new positions, side of the padding
_STEPS = (
    (1, 0, 1, ""),
    (1, 0, 24, ""),
    (3, 0, 11, "left"),
    (3, 0, 9, "right"),
    (1, 24, 1, ""),
    (4, 9, 1, "left"),
    (1, 6, 5, ""),
)
_QUICK_STEPS = ((1, 0, 1, ""), (3, 0, 9, "right"), (1, 6, 5, ""))  # left padding and single steps: see `_QUICK_PROMPTS`
_USER_STEPS = 16  # tokens that are compared after a user's own prompts
_LONG = 1000  # positions of the longest prompt, if the model has as many
# lengths of the prompts of one batch, padding side, and number of tokens to compare
_PROMPTS: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((12,), "left", 16),
    ((17, 3, 11, 6), "left", 16),
    ((9, 5, 7), "right", 4),
    ((_LONG,), "left", 4),
)
_QUICK_PROMPTS: tuple[tuple[tuple[int, ...], str, int], ...] = (((7, 3), "left", 4),)
# rows, length of the text, side of its padding, positions before, new positions
_ENCODED_STEPS = (
    (1, 24, "", 0, 1),
    (1, 1, "", 0, 6),
    (3, 11, "right", 0, 4),
    (4, 6, "left", 9, 1),
    (1, 24, "", 24, 1),
    (3, 11, "right", 5, 3),
)
_QUICK_ENCODED_STEPS = ((1, 9, "", 0, 1), (2, 6, "right", 0, 3), (2, 5, "left", 4, 1))


def decoder_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts with an empty cache, and steps after a long one, padded on the left.

    Args:
        model: The traced model.
        generator: Draws the values.
        quick: Whether a few short ones are enough, each kind once: a prompt, one of several rows padded, and what
            follows after others.

    Yields:
        A description, and inputs by name.
    """
    example = model.example_inputs[PAST]
    limit = longest_text(model)
    for batch, past, length, side in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit:
            continue
        case = {
            name: text_like(name, value, model, batch, length, generator)
            for name, value in model.example_inputs.items()
            if isinstance(value, Tensor)
        }
        mask = torch.ones(batch, past + length, dtype=torch.long)
        for row in range(1, batch) if side else ():
            count = min(2 * row, past + length - 1)
            mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
        case["attention_mask"] = mask
        if "position_ids" in case:
            case["position_ids"] = positions(mask, length)
        cache = empty_cache(example, batch)
        if past:  # computed by the model: errors on random keys and values would say nothing about texts
            first = {name: value for name, value in case.items() if name not in ("attention_mask", "position_ids")}
            first["input_ids"] = like(case["input_ids"], batch, past, generator, vocabulary_of(model))
            first["attention_mask"] = mask[:, :past]
            if "position_ids" in case:
                first["position_ids"] = positions(mask[:, :past])
            with torch.no_grad():
                cache = returned_cache(model(**model.constants, **first)) or cache
        name = f"{batch} x {length}" + (f" after {past}" if past else "") + (f" padded {side}" if side else "")
        yield name, {**case, PAST: cache}


def random_prompts(model: TracedModel, seed: int, quick: bool = False) -> Iterator[PromptBatch]:
    """Random prompts: one, several of unequal length padded on either side, and one that fills the context.

    Args:
        model: A model traced with a cache.
        seed: Seed of the tokens.
        quick: Whether two short left-padded ones are enough.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, context = vocabulary_of(model) or 4, context_of(model) or _LONG
    for lengths, side, steps in _QUICK_PROMPTS if quick else _PROMPTS:
        room = min(context, _LONG) - steps
        if room < 1:
            continue
        sizes = [min(length, room) for length in lengths]
        rows = [torch.randint(min(3, vocabulary - 1), vocabulary, (size,), generator=generator) for size in sizes]
        yield pad_prompts([row.tolist() for row in rows], side=side, steps=steps)


def pad_prompts(
    rows: Sequence[Sequence[int]], *, side: str = "left", steps: int = 16, label: str = "prompt"
) -> PromptBatch:
    """Batch prompts, the shorter ones padded.

    Args:
        rows: Token ids by prompt.
        side: Padding side, `"left"` or `"right"`.
        steps: How many tokens to compare.
        label: What to call them in the description.
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        filled = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, filled], mask[index, filled] = torch.tensor(row), 1
    sizes = sorted({len(row) for row in rows})
    size = f"{sizes[0]} to {sizes[-1]} tokens padded {side}" if len(sizes) > 1 else f"{longest} tokens"
    return PromptBatch(f"{len(rows)} {label}{'s' * (len(rows) > 1)} of {size}", ids, mask, steps)


def user_prompts(prompts: Sequence[Any], output_dir: str | Path, traced: TracedModel) -> PromptBatch:
    """A user's prompts as one batch, padded on the left.

    Args:
        prompts: Texts, chats or token ids.
        output_dir: The export directory, which holds the tokenizer for texts and chats.
        traced: The model.

    Raises:
        ExportError: A prompt is empty, too long or of another kind, or holds ids out of range.
    """
    if isinstance(prompts, str) or not prompts:
        raise ExportError("prompts are a list of texts, chats or token ids, with at least one; give such a list")
    tokenizer = load_tokenizer(output_dir, ExportError)
    rows = [prompt_ids(prompt, tokenizer, ExportError) for prompt in prompts]
    vocabulary, context = vocabulary_of(traced), context_of(traced)
    for index, row in enumerate(rows):
        wrong = [token for token in row if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if not row or wrong:
            what = f"holds token {wrong[0]}, outside the vocabulary of {vocabulary} tokens" if wrong else "is empty"
            raise ExportError(f"prompt {index} {what}; give other ids")
        if context is not None and len(row) > context - _USER_STEPS:
            raise ExportError(
                f"prompt {index} has {len(row)} tokens, and {_USER_STEPS} are added, more than the context of "
                f"{context}; shorten it"
            )
    return pad_prompts(rows, steps=_USER_STEPS, label="given prompt")


def encoder_decoder_inputs(
    model: TracedModel, generator: torch.Generator, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A decoder's first and later steps, over texts of several lengths, padded on either side.

    Args:
        model: The traced model.
        generator: Draws the values.
        quick: Whether a few short ones are enough, each kind once.

    Yields:
        A description, and inputs by name.
    """
    limit = longest_text(model)
    for batch, source, side, past, length in _QUICK_ENCODED_STEPS if quick else _ENCODED_STEPS:
        if past + length > limit or source > limit:
            continue
        example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
        case: dict[str, Any] = {
            name: text_like(name, value, model, batch, length if name.startswith("decoder_") else source, generator)
            for name, value in example.items()
        }
        pad(case, side or "right")
        pairs = [[(batch, t.shape[1], past, t.shape[3]) for t in pair] for pair in pairs_of(model.example_inputs[PAST])]
        case[PAST] = decoder_cache([[torch.randn(shape, generator=generator) for shape in pair] for pair in pairs])
        read = f"{batch} x {source}" if "input_ids" in case else f"{batch} inputs"
        padded = f" padded {side}" if side and "attention_mask" in case else ""
        yield f"{length} after {past} of {read}{padded}", case
