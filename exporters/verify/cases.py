"""Cases of a verification: freshly drawn inputs and prompts, and their runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gralora_fx.base.compat.torch_graphs import KeyPath, tree_map_with_path
from gralora_fx.base.features import parts
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import empty_cache, positions, returned_cache
from gralora_fx.core.tracing.inputs.input_trees import key_text, path_of, tensor_paths
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.translation.names import AXES, axes_of_rows, traced_sizes
from gralora_fx.exporters.verify.tolerances import ToleranceCheck
from gralora_fx.exporters.verify_report import TensorCheck, TokenCheck
from gralora_fx.format.input_names import PAST, beside_ids
from gralora_fx.format.size_limits import first_problem
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.limits import context_length

if TYPE_CHECKING:
    from gralora_fx.format.input_names import OtherValues

Case = tuple[str, Mapping[str, Any]]  # a description, and inputs by name
LENGTHS = (1, 6, 11, 24)  # lengths of texts
_ANSWER = 24  # tokens of an encoder-decoder's answer that is measured


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts."""

    description: str
    ids: Tensor  # `[batch, length]`
    mask: Tensor  # `[batch, length]`, 0 at padding
    steps: int  # number of tokens to compare


@dataclass(frozen=True)
class TokenRun:
    """An export and the model whose greedy tokens it is compared with, after their outputs."""

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
    """Comparison of greedy tokens, of `model.onnx` and of the graph of rows; empty for a model without a cache."""

    passed: bool = True
    tokens: TokenCheck | None = None
    tensors: tuple[TensorCheck, ...] = ()  # figures reported like an output's
    rows: TokenCheck | None = None


@dataclass(frozen=True)
class Verification:
    """The verification of a kind of export."""

    # returns fresh inputs of a trace from a random generator, only few if that is enough
    inputs: Callable[[TracedModel, torch.Generator, bool], Iterator[Case]]
    # returns prompts of a trace from a seed, only few if that is enough; None for a kind without prompts
    prompts: Callable[[TracedModel, int, bool], Iterator[PromptBatch]] | None = None
    compare_tokens: Callable[[TokenRun], TokenResult] = lambda _: TokenResult()  # compares greedy tokens
    description: str = "random inputs"  # of the inputs

    def cases(self, model: TracedModel, seed: int, *, quick: bool) -> list[Case]:
        """Return fresh inputs, completed by the constants of the trace."""
        drawn = self.inputs(model, torch.Generator().manual_seed(seed), quick)
        return [(description, {**model.constants, **case}) for description, case in drawn]


def context_of(model: TracedModel) -> int | None:
    """Return a model's context length, less two for models whose positions begin at two; None without a limit."""
    config = {} if model.config is None else model.config.get_text_config().to_dict()
    limits = [context_length(config, name) for name in ("input_ids", "decoder_input_ids")]
    known = [limit for limit in limits if limit is not None]
    return max(1, min(known) - 2) if known else None


def vocabulary_of(model: TracedModel) -> int | None:
    """Return a model's vocabulary size; None if its configuration has none."""
    config = None if model.config is None else model.config.get_text_config()
    return getattr(config, "vocab_size", None)


def longest_text(model: TracedModel) -> int:
    """Return the longest text to use: the context, or 24 without a limit."""
    return context_of(model) or max(LENGTHS)


def is_text(name: str) -> bool:
    """Return whether an input's second axis is positions of a text."""
    return AXES.get(name, ())[1:2] in (("sequence_length",), ("decoder_sequence_length",))


def text_like(
    name: str, value: Tensor, model: TracedModel, batch: int, length: int, generator: torch.Generator
) -> Tensor:
    """Return random values for a text input with another batch and length; for other inputs, another batch."""
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
    """Return random values like a tensor's, with another batch size and optionally another length."""
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
    """Mask a different number of positions in every row but the first; in place.

    Masked tokens become the row's smallest, for models that pool at the largest token, such as CLIP; the last token
    stays, for those that pool at the end token.
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


_STEPS = (  # rows, positions before, new positions, side of the padding
    (1, 0, 1, ""),
    (1, 0, 24, ""),
    (3, 0, 11, "left"),
    (3, 0, 9, "right"),
    (1, 24, 1, ""),
    (4, 9, 1, "left"),
    (1, 6, 5, ""),
)
_QUICK_STEPS = ((1, 0, 1, ""), (3, 0, 9, "right"), (1, 6, 5, ""))  # left padding and single steps: see `_QUICK_PROMPTS`
_LONG = 1000  # positions of the longest prompt, if the model has as many
# lengths of the prompts of one batch, padding side, and number of tokens to compare
_PROMPTS: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((12,), "left", 16),
    ((17, 3, 11, 6), "left", 16),
    ((9, 5, 7), "right", 4),
    ((_LONG,), "left", 4),
)
_QUICK_PROMPTS: tuple[tuple[tuple[int, ...], str, int], ...] = (((7, 3), "left", 4),)


def decoder_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield prompts with an empty cache, and steps after a long one, left-padded."""
    example, beside = model.example_inputs[PAST], beside_ids(model.example_inputs)
    limit = longest_text(model)
    for batch, past, length, side in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit:
            continue
        case = {
            name: text_like(name, value, model, batch, length, generator)
            for name, value in model.example_inputs.items()
            if isinstance(value, Tensor) and name not in beside
        }
        mask = torch.ones(batch, past + length, dtype=torch.long)
        for row in range(1, batch) if side else ():
            count = min(2 * row, past + length - 1)
            mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
        case["attention_mask"] = mask
        if "position_ids" in case:
            case["position_ids"] = positions(mask, length)
        cache = empty_cache(example, batch)
        if past:  # computed by the model: random keys and values would not resemble a text's
            first = {name: value for name, value in case.items() if name not in ("attention_mask", "position_ids")}
            first["input_ids"] = like(case["input_ids"], batch, past, generator, vocabulary_of(model))
            first["attention_mask"] = mask[:, :past]
            if "position_ids" in case:
                first["position_ids"] = positions(mask[:, :past])
            with torch.no_grad():
                cache = returned_cache(model(**model.constants, **first)) or cache
        name = f"{batch} x {length}" + (f" after {past}" if past else "") + (f" padded {side}" if side else "")
        for examples in parts("step examples", beside):
            case |= examples.drawn_beside(model, case, generator)
        yield name, {**case, PAST: cache}


def random_prompts(model: TracedModel, seed: int, quick: bool = False) -> Iterator[PromptBatch]:
    """Return random prompts: one, several of unequal length padded on either side, and one that fills the context."""
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
    """Batch prompts, padding the shorter ones."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        filled = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, filled], mask[index, filled] = torch.tensor(row), 1
    sizes = sorted({len(row) for row in rows})
    size = f"{sizes[0]} to {sizes[-1]} tokens padded {side}" if len(sizes) > 1 else f"{longest} tokens"
    return PromptBatch(f"{len(rows)} {label}{'s' * (len(rows) > 1)} of {size}", ids, mask, steps)


def plain_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield texts of several lengths, padded on either side; other and nested inputs in several batch sizes.

    They are such that the model takes them; if none is, the example inputs are all.
    """
    cases = [case for case in _plain_inputs(model, generator) if _runs(model, case[1])]
    yield from cases or [("the example inputs", dict(model.graph_inputs))]


def _plain_inputs(model: TracedModel, generator: torch.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
    inputs = model.graph_inputs
    sample = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(sample) < len(inputs) or not any(map(is_text, sample)):
        for batch in (1, 3):
            case = {name: _nested(model, name, value, batch, generator) for name, value in inputs.items()}
            yield f"batch {batch}", case
        yield "longer inputs", _longer(model)
        for changed, words, other in _others(model):
            case = {name: _nested(model, name, value, 2, generator) for name, value in inputs.items()}
            case[changed] = other(case[changed], generator)
            yield f"2 {words}", case
        return
    limit = longest_text(model)
    rows, positions_held = _held_sizes(model, sample)
    others = _others(model)
    for batch, length, padding in ((1, LENGTHS[0], None), (1, LENGTHS[3], None), (3, 11, "right"), (4, 6, "left")):
        batch, size = rows or batch, positions_held or min(length, limit)
        case = {name: text_like(name, value, model, batch, size, generator) for name, value in sample.items()}
        if padding and size > 1:
            pad(case, padding)
        description = f"{batch} x {size}" + (f" padded {padding}" if padding else "")
        for changed, words, other in itertools.islice(others, 1):
            case[changed] = other(case[changed], generator)
            description += f" with {words}"
        yield description, case


def _longer(model: TracedModel) -> dict[str, Any]:
    """Return the example inputs where every size that varies, beside the batch, is larger by one."""
    by_row, sizes = axes_of_rows(model), traced_sizes(model)

    def longer(keys: KeyPath, value: Any) -> Any:
        for axis, size in enumerate(sizes.get(path := ".".join(map(key_text, keys)), ())):
            if isinstance(value, Tensor) and axis not in by_row[path] and not size.isdigit():
                value = torch.cat([value, value.narrow(axis, 0, 1)], axis)
        return value

    return dict(tree_map_with_path(longer, dict(model.graph_inputs)))


def _runs(model: TracedModel, case: Mapping[str, Any]) -> bool:
    """Return whether a model takes a case's sizes and, if they are no texts, its values."""
    shapes = {path: tensor.shape for path, tensor in tensor_paths(case).items()} if model.signature.limits else {}
    if first_problem(model.signature.limits, shapes) is not None:
        return False
    try:
        return any(map(is_text, case)) or torch.no_grad()(model)(**own_inputs(case)) is not None
    except Exception:  # noqa: BLE001  # a model may raise anything for inputs that are not its own
        return False


def _others(model: TracedModel) -> Iterator[tuple[str, str, OtherValues]]:
    """Yield variants of inputs known to features: the input's name, a description, and a function that makes it."""
    for facts in model.signature.facts.values():
        yield from ((facts.input, *other) for other in facts.others(model.example_inputs[facts.input]))


def _held_sizes(model: TracedModel, sample: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Return the batch size and sequence length that a trace is fixed to; None for dynamic ones."""
    texts = [name for name in sample if AXES.get(name, ("", ""))[1:2] == ("sequence_length",)]
    sizes = [model.signature.fixed.get(name, (None, None)) for name in texts]
    rows, lengths = zip(*(size[:2] for size in sizes if len(size) > 1), strict=True) if sizes else ((), ())
    return next(filter(None, rows), None), next(filter(None, lengths), None)


def _nested(model: TracedModel, name: str, example: Any, batch: int, generator: torch.Generator) -> Any:
    """Return random values with an example's structure, with another batch size if it is dynamic."""
    by_row = axes_of_rows(model)

    def fresh(keys: KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        rows, *_ = (*model.signature.fixed.get(path := path_of(name, keys), ()), None)
        for axis in filter(None, by_row.get(path, ())):  # such as axis 1 of a recurrent layer's state
            value = value.narrow(axis, 0, 1).expand([batch if at == axis else -1 for at in range(value.ndim)])
        return like(value, rows or batch, None, generator)

    return tree_map_with_path(fresh, example)


def random_answers(model: TracedModel, seed: int) -> list[Case]:
    """Return inputs to measure an encoder-decoder on: 16 random texts, or 4 other inputs; no padding, no cache."""
    generator, length = torch.Generator().manual_seed(seed), min(_ANSWER, longest_text(model))
    example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
    cases: list[Case] = []
    for number in range(1, 5 if any(is_text(name) and not name.startswith("decoder_") for name in example) else 2):
        case = {name: text_like(name, value, model, 4, length, generator) for name, value in example.items()}
        start = getattr(model.config, "decoder_start_token_id", None)
        if isinstance(start, int):
            case["decoder_input_ids"][:, 0] = start
        empty = empty_cache(model.example_inputs[PAST], 4)
        cases.append((f"4 random inputs, part {number}", {**model.constants, **case, PAST: empty}))
    return cases
