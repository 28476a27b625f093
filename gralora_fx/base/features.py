"""Features, and the points at which they extend stages.

A feature is a capability in a folder of `gralora_fx/features/`, found by its folder. A stage asks for the parts of a
point, whose contract `POINTS` states, and imports no feature itself.
"""

from __future__ import annotations

import pkgutil
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGE = f"{__name__.partition('.')[0]}.features"
# the points: what a part is, and who asks for it
POINTS: dict[str, str] = {
    "config sizes": "Fields of config.json that set shapes, which tell the bases of adapters apart.",
    "stacks": "A regular expression for the names of parameters that stack matrices of layers; a plan then says why "
    "one has no adapter.",
    "known code": "A tuple of Recognised: code of layers, and what a trace calls in its place.",
    "step code": "The same for a decoder's step with a cache alone; signs are its kinds of rotary embedding.",
    "weight forms": "A subclass of BaseQuantization (base.sources): a format of quantized bases. The last parts of "
    "its tensors' names are signs of the feature.",
    "stored weights": "Returns a checkpoint's tensors by key, those of the form as a PackedTensor each, given their "
    "files and the quantization in its configuration, or None.",
    "rounding": "Returns a float weight [out, in] as a given quantization of the form rounds it, in float32, given "
    "its name for messages.",
    "packed weights": "Returns a linear layer's weight as a core.graph.packed_weights.PackedWeight, given floats "
    "[out, in], which a given quantization of the form rounds, or a PackedTensor of the form; its name for messages; "
    "and whether the layer's weight is [in, out].",
    "trace patches": "A context over a model, in which its layers call the feature's operators while it is traced; it "
    "does nothing for other models.",
    "step patches": "A context in which a step is traced; attributes of its cache and of the cache's layers are signs.",
    "cache kinds": "A dict of format.cache_slots.StateKind by name; the name is a sign, and so is the kind's "
    "attribute.",
    "cache layers": "A module for transformers' caches whose layers keep other kinds of state: `empty` and `fresh` "
    "make a cache and a layer like a given one, `keep` puts a state into a cache, and `longer_states` is a context "
    "over a model that notes which input windows it keeps one longer than it reads. Signs are as for step patches.",
    "cache readers": "A set of export operators, each with the input whose memory an output may share.",
    "single tokens": "Returns whether transformers' code of a model is right for single-token steps only, with which "
    "a trace is then checked.",
    "operators": "A module that defines graph operators when it is imported; code that reads a saved graph imports it.",
    "onnx operators": "A tuple of subclasses of DomainNode, into which the translation turns operators.",
    "noting passes": "A pass over a torch.fx graph that records the layers for which the operators could not be made.",
    "mixing passes": "A lowering pass for operators that mix tokens as attention does; it runs before the other "
    "lowering passes.",
    "lowering passes": "A pass over an ONNX model that replaces the translated operators by those of ONNX Runtime.",
    "cache passes": "A pass over an ONNX decoder whose fused layers read a cache under its final names.",
    "form passes": "A tuple of passes over an ONNX decoder whose rows differ in length: they give operators that "
    "earlier passes match their last form.",
    "rows": "CachedLayers of a model: layers that keep more than keys and values, in a graph whose rows differ in "
    "length.",
    "storing passes": "A pass over an ONNX model that runs once weights are stored as the plan says.",
    "weight formats": "Returns a trace's quantization plan, changed where the feature's weights need other formats.",
    "quantized weights": "Stores the weights of an ONNX model as a plan says, and returns a Quantized.",
    "rounded weights": "Reads a trace's quantized weights from an export's directory: parameters by the ids of the "
    "trace's own, and the number of quantized values.",
    "float weights": "Lets an export's operators multiply by floats, in place, for verification.",
    "arrangements": "Returns how a node stores the matrices of one of its inputs, as an Arrangement, or None; used by "
    "folding.",
    "acting tokens": "A module for adapters that act on some tokens, as their configuration's `acts_from` says: "
    "`insert_mask` adds a mask's node to a graph, `masks` finds these nodes, whose `starts` may be given, "
    "`first_columns` returns each row's first column with an active adapter, `problems` why a trace cannot have one, "
    "and `start_in_prompt` the first such token of a served prompt.",
    # the core asks for these parts only for what it does not know itself
    "traced forms": "A function of a transformers model and a task, that returns the model to trace in its place, over "
    "the same modules at the same paths, or the model itself; its configuration's model_type is a sign.",
    "call patches": "A context over a transformers model and the inputs of its trace, in which it is called.",
    "own traces": "A function that captures and checks a draft with the feature's inputs, as "
    "core.tracing.capture.trace_both_modes does.",
    "trace options": "A Mapping from options of `trace` to functions of the model, the tensors and constants of its "
    "example, and the option's value; each returns the tensors and constants to trace with.",
    "input facts": "A Mapping from keys of an export's manifest to classes of format.input_facts.InputFacts.",
    "main inputs": "Names of inputs of which a model's forward takes one in place of token ids.",
    "input axes": "A Mapping from inputs to the names of their axes; only the first varies, unless a trace of the "
    "feature's own lets more vary.",
    "step inputs": "A tuple of format.input_names.StepInput: optional inputs of a decoder's step beside its ids.",
    "step examples": "A module for a decoder step's inputs beside its ids: `examples_beside` makes an example of both "
    "for a model, ids and mask; `drawn_beside` draws both for a trace, a verification case and a generator.",
    "optional inputs": "A pass over an ONNX decoder that makes step inputs optional; nothing is folded after it.",
    "given rows": "A subclass of run.engine.session_decoders.GivenRows: the inputs with which rows begin in place of "
    "tokens, and the prompts for the embeddings passed to `generate`.",
    "program graphs": "A function of a model's configuration and an export's ONNX models by file name, that returns "
    "more of them, over the same weights, which other programs run in place of `model.onnx`.",
    "program files": "A function of an export's directory, the model's configuration, the ONNX models by file name "
    "and the contents of genai_config.json, which it changes; it writes further files that other programs read.",
    "companion files": "Returns the processor that makes inputs of a companion or an encoder from prompts, to be saved "
    "in place of the tokenizer, given the tokenizer and its source; None if there is none. Names of companions, or the "
    "task of an encoder-decoder, are signs.",
    "given prompts": "A class like run.generate.prompt_answers.GivenPrompts, whose `of` takes an open export (the "
    "names of its companions are signs) and returns None if they read no prompts.",
    "export options": "A dataclass like cli.export.TraceOptions: options of the command for some kind of model.",
    "tasks": "A tuple of format.tasks.Task: tasks that models can be traced for.",
    "companions": "A function of a traced decoder, that returns traces of the models that run beside it, by file "
    "name, over the same parameters.",
    "companion checks": "A class like exporters.verify.together.CompanionCheck: makes inputs of companions, whose "
    "names are signs, and compares the outputs of companions and decoder together.",
    "example inputs": "A function of a model, the name of its main input and a generator, that returns an example of "
    "the input, or None if it knows none (core.tracing.inputs.samples); the name is a sign.",
    "encoder inputs": "A subclass of run.generate.encoder_inputs.EncoderInputs; the encoder's inputs are signs.",
    "generate options": "A dataclass like cli.generate.PromptOptions: options of the command for such prompts.",
    "constraints": "A class of run.generate.constraints.Constraints, made from a tokenizer, or None, and a decoder's "
    "limits.",
    "proposers": "A class of run.generate.answer_row.Proposer, made without arguments: proposes next tokens of rows, "
    "which a step verifies.",
    "request fields": "Models of fields by the name of the request of OpenAI's protocol that has them (the decorator "
    "with_features), and its hooks (service.protocols.openai.answer_plan).",
    "attachments": "A function of an open export, whose companions and task are signs, and the service's settings; "
    "returns a service.engines.AttachmentReader, or None if the export reads none.",
    "serve options": "A dataclass whose fields are options of the service for some kind of model; it is in `more` of "
    "the settings.",
    "chat templates": "A class whose `of` reads what a tokenizer's chat template supports, for the hooks of requests; "
    "its text is a line of the log.",
    "inferred tasks": "A function of the names of an adapter and a base, that returns the task that their files show "
    "and the arguments of trace for it, or None.",
    "scores": "A function of the configuration of a model with one output and its name, which records there how a "
    "score is computed from it.",
    "appended modules": "A function of a model, its task, which is a sign of the feature, and the source given to "
    "trace, that returns AppendedModules (core.tracing.draft).",
    "routes": "A function of a service's engine, that returns a router with the routes for its model, if it has any. "
    "The model's task or an output of its graph is a sign of the feature.",
}
_OWN = "gralora_"  # prefix of this project's metadata keys


@dataclass(frozen=True)
class Feature:
    """A capability in its own folder, as the folder's `feature.toml` describes it; reading that imports nothing."""

    name: str  # name of its folder
    # names by which a graph shows that it uses the feature: operators of a trace or an ONNX model, such as
    # `"gralora::attention"`, metadata keys of an export's nodes and its manifest, inputs of traces and exports, names
    # of tasks, and model types; or by which a checkpoint does: last parts of its tensors' names, such as `"absmax"`
    signs: frozenset[str] = frozenset()
    # what it adds, by point: `"module:name"` below its folder, or `"module"` for a module whose import is all
    parts: Mapping[str, str] = field(default_factory=dict)

    def part(self, point: str) -> Any:
        """Import the part that the feature adds at a point."""
        key = self.parts[point]
        if (self.name, key) not in _LOADED:
            module, _, name = key.partition(":")
            found = import_module(f"{_PACKAGE}.{self.name}.{module}")
            _LOADED[self.name, key] = getattr(found, name) if name else found
        return _LOADED[self.name, key]


# What was read and imported so far, in plain containers, which torch.compile reads while it traces a forward pass.
_FEATURES: list[Feature] = []
_LOADED: dict[tuple[str, str], Any] = {}


def features() -> list[Feature]:
    """Return the installed features by name."""
    if not _FEATURES:
        (folder,) = import_module(_PACKAGE).__path__
        names = sorted(module.name for module in pkgutil.iter_modules([folder]) if module.ispkg)
        found = [_read(Path(folder, name, "feature.toml")) for name in names]
        _FEATURES[:] = found  # at once, and once where several threads ask first
    return _FEATURES


def _read(file: Path) -> Feature:
    record = tomllib.loads(file.read_text(encoding="utf-8"))
    return Feature(file.parent.name, frozenset(record.get("signs", ())), record["parts"])


def parts(point: str, signs: Collection[str] | None = None) -> list[Any]:
    """Import the parts at a point; if a graph's signs are given, only of features that they show."""
    asked = features() if signs is None else [feature for feature in features() if not feature.signs.isdisjoint(signs)]
    return [feature.part(point) for feature in asked if point in feature.parts]


def marks(keys: Collection[str]) -> set[str]:
    """Return the metadata keys of nodes that this project writes; some are signs of features."""
    return {key for key in keys if key.startswith(_OWN)}
