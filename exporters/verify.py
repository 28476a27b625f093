"""`verify_onnx`: an export held against the PyTorch model on fresh inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.artifact.fingerprint import fingerprint_of
from gralora_fx.exporters.folded_model import as_traced, base_of
from gralora_fx.exporters.fx_passes.cast_graph import precision_of
from gralora_fx.exporters.onnx_passes.quantize import Quantization
from gralora_fx.exporters.options import LEVELS, check_choice
from gralora_fx.exporters.reports import TensorCheck, VerifyReport
from gralora_fx.exporters.verification.dequantized_model import rounded
from gralora_fx.exporters.verification.float32_copy import write_float32_twin
from gralora_fx.exporters.verification.float64_reference import InFloat64, Judge
from gralora_fx.exporters.verification.greedy_tokens import Prompts, compare_greedy, drawn_prompts, together
from gralora_fx.exporters.verification.inputs import attended, context_of, flat, fresh_cases, last_logits, vocabulary_of
from gralora_fx.exporters.verification.manifest_adapters import check_active_adapters
from gralora_fx.exporters.verification.seq2seq_tokens import compare_tokens
from gralora_fx.exporters.verification.tolerances import describe_weights, largest_gap, largest_value, tolerance_of
from gralora_fx.loading.tokenizers import load_tokenizer, prompt_ids
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.encoder_decoder_session import EncoderDecoderSession
from gralora_fx.runtime.manifest import check_files, read_manifest
from gralora_fx.runtime.ort_values import as_tensor, run_values
from gralora_fx.runtime.session import open_session
from gralora_fx.tracing.inputs.decoder_cache import PAST
from gralora_fx.tracing.inputs.input_trees import own_inputs, tensor_paths
from gralora_fx.tracing.traced_model import CALL_TRACE, TracedModel

_GIVEN_STEPS = 16


def verify_onnx(
    output_dir: str | Path,
    model: TracedModel | GraloraModel,
    level: Literal["quick", "full"] = "full",
    *,
    inputs: Mapping[str, Any] | None = None,
    prompts: Sequence[Any] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    check: bool = True,
) -> VerifyReport:
    """Compare an export with the model on inputs that neither has seen: other sizes, padded rows, a single row.

    An export with a cache generates besides, its cache fed back at every step: greedy tokens and logits are compared
    for prompts of unequal length, padded on either side, and for one that fills the context (up to 1,000 positions).
    A quick verification compares two short prompts for four tokens.

    Args:
        output_dir: The export directory.
        model: The model it was exported from; a `GraloraModel` runs with its active adapters as they stand, so that a
            wrong fold would show.
        level: `"full"`, or `"quick"` for few and short inputs of a model with a cache: each kind of step once. Models
            without a cache are compared on the same inputs either way.
        inputs: A user's own inputs, compared in addition.
        prompts: A user's own prompts for an export with a cache, compared in addition: texts, chats or token ids.
        tolerance: Largest difference allowed, relative to the largest value or to 1 where that is smaller; None for
            what the export's precision explains (see `tolerances`), or four times what float32 itself rounds
            where that is more (see `exact`).
        seed: Seed of the fresh inputs.
        check: Whether to compare every file with its SHA-256 first; False where that has been done.

    Returns:
        Differences and argmax agreement for every output, and the greedy tokens of an export with a cache. A bfloat16
        export, which ONNX Runtime's CPU provider cannot run, is run with its own weights and float32 arithmetic, and so
        is a quantized one. They are held against the model with the same rounded weights: what the rounding itself
        costs is for a task to say.

    Raises:
        ExportError: The directory is no export or one of another base or adapter, a file is not what was exported, its
            inputs or outputs are not the model's, a prompt does not fit, or a case cannot run.
    """
    check_choice("level", level, LEVELS)
    quick = level == "quick"
    manifest = read_manifest(output_dir)
    if check and "files" in manifest:  # a comparison runs some inputs only, and would not see every changed byte
        check_files(output_dir, manifest, digests=True)
    if not isinstance(model, (TracedModel, GraloraModel)):
        raise ExportError(f"cannot run a {type(model).__name__}; {CALL_TRACE} and give what it or rewrite() returned")
    refuse_without_values(model)
    _check_same_model(output_dir, manifest, model)
    session, arithmetic = _session(Path(output_dir), manifest)
    names = [value.name for value in session.get_inputs()]
    traced = base_of(model)
    cases = list(fresh_cases(traced, seed, quick=quick))
    _check_inputs(names, cases[0][1])
    allowed = tolerance_of(manifest) if tolerance is None else tolerance
    if inputs is not None:
        cases.append(("given inputs", dict(inputs)))
    has_cache = isinstance(traced.example_inputs.get(PAST), DynamicCache)
    generated = list(drawn_prompts(traced, seed, quick=quick)) if has_cache else []
    if prompts is not None:
        generated.append(_given_prompts(prompts, output_dir, traced))
    was_training = model.training
    reference = _reference(model, manifest)
    reference.eval()
    judge = Judge(reference, allowed, exact=tolerance is None)
    differences: dict[str, list[tuple[float, float, float | None]]] = {}
    passed = True
    try:
        for description, case in cases:
            exactly = _exactly(case, manifest)
            compared = _compare(session, names, reference, case, description, manifest)
            for index, (name, expected, actual) in enumerate(compared):
                differences.setdefault(name, []).append(_difference(name, expected, actual))
                passed &= judge.accepts(f"{description}, {name}", expected, actual, exactly(index))
        if isinstance(session, EncoderDecoderSession):
            share = compare_tokens(session, reference, cases, quick=quick)
            differences["greedy tokens"] = [(1.0 - share, 1.0 - share, share)]
            passed &= share == 1.0
        tokens = compare_greedy(session, reference, generated, judge) if generated else None
    finally:
        reference.train(was_training)
    passed &= tokens is None or tokens.passed
    tensors = tuple(_summary(name, found) for name, found in differences.items())
    described = tuple(description for description, _ in cases)
    return VerifyReport(
        passed,
        allowed,
        described,
        tensors,
        tokens,
        describe_weights(manifest),
        arithmetic,
        rounding=tuple(judge.found),
        level=level,
        reference=_describe_reference(model, reference),
    )


def refuse_without_values(model: TracedModel | GraloraModel) -> None:
    """Refuse to run a model whose weights stand in their files.

    Raises:
        ExportError: Some do.
    """
    traced = base_of(model)
    missing = next((name for name, parameter in traced.tree.parameters.items() if parameter.is_meta), None)
    if missing is not None:
        raise ExportError(
            f"{missing} has no values in memory, so there is nothing to compare with; export a streamed model with "
            "verify=False, and compare the export with the model loaded whole (gralora-fx verify)"
        )


def _session(directory: Path, manifest: Mapping[str, Any]) -> tuple[Any, str]:
    """A session over an export, or over its float32 twin (see `twin`), and what it computes in."""
    precision = str(manifest.get("precision", "fp32"))
    if precision != "bf16" and not manifest.get("quantization"):
        return open_session(directory), precision
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.absolute().parent) as twin:
        write_float32_twin(directory, Path(twin))
        return open_session(twin), "fp16" if precision == "fp16" else "fp32"


def _reference(model: TracedModel | GraloraModel, manifest: Mapping[str, Any]) -> TracedModel | GraloraModel:
    """The model itself; for an export of another precision the adapter-free one with the same rounded weights."""
    precision, found = str(manifest.get("precision", "fp32")), manifest.get("quantization")
    traced = base_of(model)
    if found is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    how = None if found is None else Quantization(found["kind"], found["block_size"], found["accuracy_level"])
    known = sum({id(site.weight): site.weight.numel() for site in traced.sites}.values())
    if found is not None and found["values"] != known:
        raise ExportError(
            f"the export holds {found['values']:,} quantized values and the model's linear layers {known:,}, so there "
            "is no model with the same rounded weights to compare it with; export with verify=False and judge it by "
            "what it is for"
        )
    return rounded(as_traced(model), precision, how, with_tables=found is not None and found["lookups"] > 0)


def _describe_reference(model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel) -> str:
    """What an export was compared with, in words."""
    active = model.active_adapters if isinstance(model, GraloraModel) else []
    adapters = f" with {', '.join(map(repr, active))} active" if active else ""
    return f"the PyTorch model{adapters}" + ("" if reference is model else ", its weights rounded as the export's are")


def _check_same_model(output_dir: str | Path, manifest: Mapping[str, Any], model: TracedModel | GraloraModel) -> None:
    """Refuse to compare an export with another model than its own: every difference would look like a fault."""
    expected, found = manifest.get("base_fingerprint"), fingerprint_of(model)
    if expected not in (None, found) and not _is_merged(model, str(expected)):
        names = manifest.get("inputs")
        if isinstance(names, dict) and all(isinstance(shape, list) for shape in names.values()):  # of a single file
            _check_inputs(list(names), base_of(model).example_inputs)
        raise ExportError(
            f"{output_dir} was exported from another base: its weights have fingerprint {str(expected)[:12]}, those of "
            f"the given model {found[:12]}; give the base that was exported, with its adapters active rather than "
            "folded"
        )
    check_active_adapters(manifest, str(output_dir), model)


def _is_merged(model: TracedModel | GraloraModel, fingerprint: str) -> bool:
    """Whether weights with this fingerprint are the model's with its active adapters folded: exported after a merge."""
    return bool(getattr(model, "active_adapters", ())) and fingerprint_of(as_traced(model)) == fingerprint


def _check_inputs(names: list[str], case: Mapping[str, Any]) -> None:
    given = flat(case)
    missing = [name for name in names if name not in given]
    if missing:
        raise ExportError(f"the export takes {', '.join(missing)}, which the model does not; give the model it is of")


def _given_prompts(prompts: Sequence[Any], output_dir: str | Path, traced: TracedModel) -> Prompts:
    """A user's prompts, checked."""
    if not isinstance(traced.example_inputs.get(PAST), DynamicCache):
        raise ExportError("the export has no cache, so it takes no prompts; give inputs")
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
        if context is not None and len(row) > context - _GIVEN_STEPS:
            raise ExportError(
                f"prompt {index} has {len(row)} tokens, and {_GIVEN_STEPS} are added, more than the context of "
                f"{context}; shorten it"
            )
    return together(rows, steps=_GIVEN_STEPS, what="given prompt")


def _compare(
    session: Any,
    names: list[str],
    model: TracedModel | GraloraModel,
    case: Mapping[str, Any],
    description: str,
    manifest: Mapping[str, Any],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    feed = flat(case)
    try:
        with torch.no_grad():
            expected = _outputs(model, case, manifest)
    except Exception as error:  # a model raises what it likes
        raise ExportError(f"the model itself fails on {description}: {first_line(error)}") from error
    missing = [name for name in names if name not in feed]
    if missing:
        raise ExportError(f"{description} lack {', '.join(missing)}, which the export takes; give every input")
    results = run_values(session, {name: feed[name] for name in names}, description)
    found = {name: as_tensor(value) for name, value in results.items()}
    if len(expected) != len(found):
        raise ExportError(f"the export gives {', '.join(found)}, the model {', '.join(expected)}; export it again")
    if set(expected) != set(found):
        expected = dict(zip(found, expected.values(), strict=True))
    kept_expected, kept_actual = attended(expected, case), attended(found, case)
    for name, value in kept_expected.items():
        if value.shape != kept_actual[name].shape:
            raise ExportError(
                f"{name} has shape {list(kept_actual[name].shape)} in the export and {list(value.shape)} in the model"
                f" on {description}; it is an export of another model"
            )
        yield name, value.float(), kept_actual[name].float()


def _outputs(model: Callable[..., Any], case: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """A model's outputs by name, the logits that the export gives."""
    found = named_outputs(model(**own_inputs(case)))
    if manifest.get("logits") == "last":
        found["logits"] = last_logits(found["logits"], flat(case)["attention_mask"])
    return found


def _exactly(case: Mapping[str, Any], manifest: Mapping[str, Any]) -> Callable[[int], Callable[[InFloat64], Tensor]]:
    """Gives an output of a case by its place, as a model to run computes it; each model is run once."""
    made: dict[int, list[Tensor]] = {}

    def at(index: int) -> Callable[[InFloat64], Tensor]:
        def run(model: InFloat64) -> Tensor:
            if model.draw not in made:
                made[model.draw] = list(attended(_outputs(model, case, manifest), case).values())
            return made[model.draw][index]

        return run

    return at


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a model's return value by name, nested ones by their path."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping) and isinstance(outputs.get(PAST), Cache):
        return flat(outputs)
    if isinstance(outputs, (list, tuple)):
        outputs = {str(index): value for index, value in enumerate(outputs)}
    if isinstance(outputs, Mapping):
        return tensor_paths({str(name): value for name, value in outputs.items()})
    return {path.removeprefix("output."): tensor for path, tensor in tensor_paths({"output": outputs}).items()}


def _difference(name: str, expected: Tensor, actual: Tensor) -> tuple[float, float, float | None]:
    absolute, largest = largest_gap(expected, actual), largest_value(expected)
    agreement = None
    if "logits" in name and expected.numel():
        agreement = float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
    return absolute, absolute / largest if largest else absolute, agreement


def _summary(name: str, found: list[tuple[float, float, float | None]]) -> TensorCheck:
    agreements = [agreement for _, _, agreement in found if agreement is not None]
    return TensorCheck(
        name=name,
        max_abs_error=max(absolute for absolute, _, _ in found),
        max_rel_error=max(relative for _, relative, _ in found),
        argmax_agreement=min(agreements) if agreements else None,
    )
