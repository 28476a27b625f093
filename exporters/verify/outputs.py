"""Comparison of an export's outputs with the model's on the same inputs, by name, without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from gralora_fx.base.progress.stages import counted
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import positions, returned_cache, tensors_of
from gralora_fx.core.tracing.inputs.input_trees import tensor_paths
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.verify.cases import Case, TokenResult, TokenRun
from gralora_fx.exporters.verify.tolerances import Tally, ToleranceCheck
from gralora_fx.format.cache_slots import slot_of
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.format.input_names import PRESENT_PREFIX
from gralora_fx.run.sessions.ort_values import as_tensor, optional_arguments, run_values
from gralora_fx.run.sessions.session_views import transposed_states

if TYPE_CHECKING:  # loaded where a difference is above the tolerance
    from gralora_fx.exporters.verify.float64_model import Float64Model


@dataclass(frozen=True)
class OutputComparison:
    """An export and the model to compare it with."""

    session: Any
    model: TracedModel | GraloraModel  # in evaluation mode
    logits: str  # which positions' logits the export gives: "last" or "all"

    def run(self, cases: Sequence[Case], check: ToleranceCheck) -> Tally:
        """Compare every output on inputs."""
        tally = Tally(check)
        for description, case in counted(cases, "comparing outputs", "inputs"):
            expected, actual = (without_padding(outputs, case) for outputs in self.both(case, description))
            in_float64 = cache(partial(self._counted, case))  # by model: each runs once
            for index, (name, value) in enumerate(expected.items()):
                if value.shape != actual[name].shape:
                    ours, models = list(actual[name].shape), list(value.shape)
                    raise ExportError(
                        f"{name} has shape {ours} in the export and {models} in the model on {description}; it is an "
                        "export of another model"
                    )
                pair, place = (value.detach().float(), actual[name].float()), f"{description}, {name}"
                tally.add(name, place, *pair, partial(_output, in_float64, index))
        return tally

    def both(self, case: Mapping[str, Any], description: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return all outputs of the model and of the export, by the export's names, including padding."""
        values, names = flat(case), [value.name for value in self.session.get_inputs()]
        names += [value.name for value in optional_arguments(self.session)]
        expected = self._outputs(partial(run_model, self.model, description), case)
        missing = [name for name in names if name not in values]
        if missing:
            raise ExportError(f"{description} lack {', '.join(missing)}, which the export takes; give every input")
        swapped = transposed_states(self.session)
        feed = {name: values[name].mT if name in swapped else values[name] for name in names}
        results = {name: as_tensor(value) for name, value in run_values(self.session, feed, description).items()}
        actual = {name: value.mT if name in swapped else value for name, value in results.items()}
        if len(expected) != len(actual):
            raise ExportError(f"the export gives {', '.join(actual)}, the model {', '.join(expected)}; export it again")
        if set(expected) != set(actual):
            expected = dict(zip(actual, expected.values(), strict=True))
        return expected, actual

    def _outputs(self, model: Callable[..., Any], case: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a model's outputs by name, with only the logits that the export returns."""
        outputs = named_outputs(model(**own_inputs(case)))
        if self.logits == "last":
            outputs["logits"] = last_logits(outputs["logits"], flat(case)["attention_mask"])
        return outputs

    def _counted(self, case: Mapping[str, Any], model: Float64Model) -> list[Tensor]:
        """Return a float64 model's outputs in order, without padding."""
        return list(without_padding(self._outputs(model, case), case).values())


def _output(run: Callable[[Float64Model], list[Tensor]], index: int, model: Float64Model) -> Tensor:
    return run(model)[index]


def compare_rows(run: TokenRun) -> TokenResult:
    """Compare the outputs of `model_rows.onnx`, if it exists, on the inputs of `model.onnx`."""
    if run.rows is None:
        return TokenResult()
    tally = OutputComparison(run.rows, run.model, "all").run(run.cases, run.tolerance_check)
    named = (dataclasses.replace(tensor, name=f"{ROWS_NAME}: {tensor.name}") for tensor in tally.tensors)
    return TokenResult(tally.passed, tensors=tuple(named))


def run_model(model: TracedModel | GraloraModel, description: str, **inputs: Any) -> Any:
    """Run the reference model."""
    try:
        with torch.no_grad():
            return model(**inputs)
    except Exception as error:  # a model may raise any exception
        raise ExportError(f"the model itself fails on {description}: {first_line(error)}") from error


def flat(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors by the names of an exported graph: nested ones by path, a cache by layer."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Cache):
            tensors |= _named(value, is_present="logits" in values)
        else:
            tensors |= tensor_paths({name: value})
    return tensors


def _named(cache: Cache, *, is_present: bool) -> dict[str, Tensor]:
    tensors = tensors_of(cache)
    if isinstance(cache, EncoderDecoderCache):
        crossed = tensors_of(cache.cross_attention_cache)
        tensors |= {dataclasses.replace(slot, part="encoder"): tensor for slot, tensor in crossed.items()}
    return {slot.present if is_present else slot.past: tensor for slot, tensor in tensors.items()}


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's return value by name, nested ones by path."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if (cache := returned_cache(outputs)) is not None:
        step = outputs if isinstance(cache, EncoderDecoderCache) else {"logits": outputs["logits"], "cache": cache}
        return flat(step)  # other return values of a decoder's model are not exported
    if isinstance(outputs, (list, tuple)):
        outputs = {str(index): value for index, value in enumerate(outputs)}
    if isinstance(outputs, Mapping):
        return tensor_paths({str(name): value for name, value in outputs.items()})
    return {path.removeprefix("output."): tensor for path, tensor in tensor_paths({"output": outputs}).items()}


def last_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits `[batch, 1, vocabulary]` at each row's last position that the mask `[batch, total]` keeps."""
    window = mask[:, mask.shape[1] - logits.shape[1] :]
    last = window.shape[1] - 1 - window.flip(1).argmax(1)
    return logits[torch.arange(logits.shape[0]), last].unsqueeze(1)


def without_padding(outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return outputs without the positions that the attention mask hides, whose values are undefined.

    Keys and values `[batch, heads, length, size]` keep unmasked positions; states are kept; a decoder's logits keep the
    last positions; other outputs `[batch, length, ...]` keep unmasked positions, in an encoder-decoder of the encoder's
    text.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return dict(outputs)
    has_encoder, has_cache = "decoder_input_ids" in inputs, any(name.startswith(PRESENT_PREFIX) for name in outputs)

    def counted(name: str, value: Tensor) -> Tensor:
        slot = slot_of(name)
        if slot is not None:
            if slot.kind.grows is None:
                return value
            by_position = value.movedim(slot.kind.grows, 1)
            return by_position[mask.bool()] if ".encoder." in name or not has_encoder else value
        if has_cache and not has_encoder:
            return value if value.shape[1] == 1 else last_logits(value, mask)
        is_masked = name.startswith("encoder") if has_encoder else value.shape[:2] == mask.shape
        return value[mask.bool()] if is_masked else value

    return {name: counted(name, value) for name, value in outputs.items()}


def step_inputs(ids: Tensor, mask: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return the inputs in `names` of a decoder's step, given ids `[batch, new]` and mask `[batch, past + new]`."""
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}
    return {name: value for name, value in inputs.items() if name in names}


def check_inputs(names: Iterable[str], case: Mapping[str, Any]) -> None:
    """Check that a model takes every input of an export."""
    taken = flat(case)
    missing = [name for name in names if name not in taken]
    if missing:
        raise ExportError(
            f"the export takes {', '.join(missing)}, which the model does not; give the model that was exported"
        )
