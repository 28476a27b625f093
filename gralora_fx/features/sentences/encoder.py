"""A transformer and its sentence encoder modules as one forward to trace."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from gralora_fx.core.tracing.draft import AppendedModules
from gralora_fx.core.tracing.inputs.samples import check_head
from gralora_fx.errors import CheckpointError, TraceError, an, first_line, warn_caller
from gralora_fx.features.sentences import stored_modules as described
from gralora_fx.features.sentences.recognised import SETTINGS_NAME, find_sentence_directory
from gralora_fx.features.sentences.stored_modules import SENTENCE, TOKENS, SentenceModules
from gralora_fx.format.tasks import task_of_class

_NAME = "sentence_modules"
_SMALLEST_COUNT = 1e-9


@dataclass
class SentenceEncoderOutput(ModelOutput):  # type: ignore[misc]  # transformers has no types
    """Output of a sentence encoder."""

    token_embeddings: Tensor | None = None  # `[batch, length, hidden]`; undefined at padding
    sentence_embedding: Tensor | None = None  # `[batch, size]`


@dataclass(frozen=True)
class SentenceEncoder(AppendedModules):
    """The modules that follow a transformer."""

    modules: SentenceModules  # their description, read from its files

    def appended_to(self, model: nn.Module) -> AbstractContextManager[None]:
        """Append them to a model's forward while the block runs."""
        return followed_by(model, self.modules)

    def told_to(self, tokenizer: Any, config: Any) -> Any:
        """Return a copy of a tokenizer that truncates and lowercases as sentence-transformers does."""
        return settings_of_tokenizer(tokenizer, self.modules, config)

    def write(self, directory: Path) -> None:
        """Write the prompts and the similarity function."""
        write_settings(directory, self.modules)


def sentence_encoder_of(model: object, task: str, source: str | Path | None) -> SentenceEncoder:
    """Return the modules that follow a model: those of its directory, or of another if given."""
    return SentenceEncoder(_modules_of(model, task, source))


def _modules_of(model: object, task: str, source: str | Path | None) -> SentenceModules:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TraceError(
            f"task {task!r} needs a transformers model, but got {an(name)}; give AutoModel.from_pretrained(directory), "
            "where a SentenceTransformer is saved with save_pretrained"
        )
    if model.config.is_encoder_decoder or task_of_class(name) != "feature-extraction":
        raise TraceError(
            f"task {task!r} needs a model that returns hidden states, but got {an(name)}; load it with AutoModel, or a "
            "T5 with T5EncoderModel"
        )
    check_head(model, task)
    origin = str(source or model.config._name_or_path)
    directory = find_sentence_directory(origin) if origin else None
    if directory is not None:
        return described.read_sentence_modules(directory)
    if source is not None:
        raise TraceError(f"{source} holds no modules.json of a sentence encoder; give a directory that does")
    return _default_modules(model, origin)


def _default_modules(model: PreTrainedModel, origin: str) -> SentenceModules:
    """Return sentence-transformers' defaults without `modules.json`: last-token pooling for decoders, else mean."""
    config = model.config
    is_decoder = bool(config.architectures) and config.architectures[0].endswith("ForCausalLM")
    mode = "lasttoken" if is_decoder and getattr(config, "is_causal", True) else "mean"
    warn_caller(
        f"{origin or type(model).__name__} has no modules.json, so its sentence embedding is {_MODE_NAMES[mode]}, as "
        "sentence-transformers would take it"
    )
    return SentenceModules(origin, (described.Pooling((mode,)),))


_MODE_NAMES = {"mean": "the mean of its token embeddings", "lasttoken": "the embedding of its last token"}


@contextmanager
def followed_by(model: nn.Module, modules: SentenceModules) -> Iterator[None]:
    """Append a sentence encoder's modules to a model's forward within the block; paths of its own modules stay."""
    assert isinstance(model, PreTrainedModel)
    device = "cpu" if model.device.type == "meta" else model.device
    model.add_module(_NAME, _Steps(modules).to(device, model.dtype))
    try:
        with patch.object(model, "forward", _pooled(model)):
            yield
    finally:
        delattr(model, _NAME)


def _pooled(model: PreTrainedModel) -> Callable[..., SentenceEncoderOutput]:
    forward, steps = model.forward, model.get_submodule(_NAME)

    @functools.wraps(forward)
    def pooled(*args: Any, **kwargs: Any) -> SentenceEncoderOutput:
        outputs = forward(*args, **kwargs)
        states = getattr(outputs, "last_hidden_state", None)
        if states is None:
            raise TraceError(f"{type(model).__name__} returns no last_hidden_state to pool; load it with AutoModel")
        return SentenceEncoderOutput(*steps(states, kwargs.get("attention_mask")))

    return pooled


class _Steps(nn.Module):
    """The modules after the transformer, in order, on token and sentence embeddings."""

    def __init__(self, modules: SentenceModules) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_MODULES[type(step)](step) for step in modules.steps)
        self.described, self.size = modules.steps, modules.truncate_dim

    def forward(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device) if mask is None else mask
        embeddings = {TOKENS: states}
        for step, description in zip(self.steps, self.described, strict=True):
            if isinstance(description, described.Pooling):
                embeddings[SENTENCE] = step(embeddings[TOKENS], mask)
            else:
                embeddings[description.writes] = step(embeddings[description.reads])
        return embeddings[TOKENS], embeddings[SENTENCE][..., : self.size]


class _Pooling(nn.Module):
    """Pools token embeddings `[batch, length, size]` to one per row; sums are in float32."""

    def __init__(self, description: described.Pooling) -> None:
        super().__init__()
        self.modes = description.modes

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([_POOLED[mode](states, mask) for mode in self.modes], dim=-1)


def _raised(values: Tensor) -> Tensor:
    """Return values in float32, or float64 unchanged."""
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def _weighted(states: Tensor, weights: Tensor, power: float = 1.0) -> Tensor:
    """Return weighted sums of states, weights `[batch, length]`, divided by a power of the weights' sum."""
    raised = _raised(states)
    weights = weights.unsqueeze(-1).to(raised.dtype)
    total = weights.sum(1).clamp(min=_SMALLEST_COUNT)
    total = total.sqrt() if power == 0.5 else total
    return ((raised * weights).sum(1) / total).to(states.dtype)


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill((mask == 0).unsqueeze(-1), float("-inf")).amax(1)


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """Return each row's state at its position `[batch]`."""
    return states.gather(1, positions.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)


def _counted(mask: Tensor) -> Tensor:
    """Return positions `[batch, length]` counted from 1 at the first non-padding token; 0 at padding."""
    first = mask.to(torch.int32).argmax(1, keepdim=True)
    return (torch.arange(1, mask.shape[1] + 1, device=mask.device) - first) * mask


_POOLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda states, mask: _at(states, mask.to(torch.int32).argmax(1)),
    "max": _largest,
    "mean": _weighted,
    "mean_sqrt_len_tokens": lambda states, mask: _weighted(states, mask, 0.5),
    "weightedmean": lambda states, mask: _weighted(states, _counted(mask)),
    "lasttoken": lambda states, mask: _at(states, _counted(mask).to(torch.int32).argmax(1)),
}


class _Normalize(nn.Module):
    """Embeddings `[..., size]` divided by their L2 norm, computed in float32."""

    def __init__(self, _: described.Normalize) -> None:
        super().__init__()

    def forward(self, embeddings: Tensor) -> Tensor:
        return functional.normalize(_raised(embeddings), dim=-1).to(embeddings.dtype)


class _Dense(nn.Module):
    """`activation(x @ weight.T + offset)`, plus `x` or its projection with a residual connection.

    It is not an `nn.Linear` and has no parameter named `bias`, so that `all-linear` and `bias="all"` skip it, as they
    do in sentence-transformers, which adapts the transformer alone.
    """

    weight: nn.Parameter
    offset: nn.Parameter | None
    projection: nn.Parameter | None

    def __init__(self, description: described.Dense) -> None:
        super().__init__()
        tensors = _tensors(description)
        for name, key in (("weight", "linear.weight"), ("offset", "linear.bias"), ("projection", "residual.weight")):
            self.register_parameter(name, nn.Parameter(tensors[key]) if key in tensors else None)
        activation = getattr(nn, description.activation, None)
        if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
            raise TraceError(
                f"{description.file.parent} has the activation {description.activation}, not one of torch.nn"
            )
        self.activation = activation()
        self.has_residual = description.has_residual

    def forward(self, embeddings: Tensor) -> Tensor:
        result: Tensor = self.activation(functional.linear(embeddings, self.weight, self.offset))
        if not self.has_residual:
            return result
        return result + (embeddings if self.projection is None else functional.linear(embeddings, self.projection))


def _tensors(description: described.Dense) -> dict[str, Tensor]:
    """Read the tensors of a Dense module, in float32."""
    try:
        tensors = load_file(description.file)
    except (SafetensorError, OSError) as error:
        raise TraceError(f"{description.file} cannot be read ({first_line(error)}); copy it again") from error
    if unknown := sorted(tensors.keys() - {"linear.weight", "linear.bias", "residual.weight"}):
        raise TraceError(f"{description.file} holds {', '.join(unknown)}, which a Dense does not have; save it again")
    if "linear.weight" not in tensors:
        raise TraceError(f"{description.file} holds no linear.weight; save it again")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


_MODULES: dict[type, Callable[[Any], nn.Module]] = {
    described.Pooling: _Pooling,
    described.Normalize: _Normalize,
    described.Dense: _Dense,
}


def write_settings(directory: Path, modules: SentenceModules) -> None:
    """Write prompts and the similarity function, if there are any."""
    if modules.settings:
        text = json.dumps(modules.settings, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / SETTINGS_NAME).write_text(f"{text}\n", encoding="utf-8")


def settings_of_tokenizer(
    tokenizer: PreTrainedTokenizerBase, modules: SentenceModules, config: PreTrainedConfig | None
) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that truncates and lowercases as sentence-transformers does."""
    changed: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    if modules.max_seq_length is not None:
        changed.model_max_length = modules.max_seq_length
    elif isinstance(positions, int) and positions > 0:
        changed.model_max_length = min(changed.model_max_length, positions)
    if modules.lowercases:
        backend = getattr(changed, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError(
                f"{modules.source} sets do_lower_case, which {type(tokenizer).__name__} does not support; export "
                "without the tokenizer, and lowercase texts yourself"
            )
        if backend.normalizer is None or "Lowercase(" not in repr(backend.normalizer):
            parts = (
                [normalizers.Lowercase()]
                if backend.normalizer is None
                else [normalizers.Lowercase(), backend.normalizer]
            )
            backend.normalizer = normalizers.Sequence(parts)
    return changed
