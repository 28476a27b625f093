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
    "config sizes": "Fields of config.json that set shapes, by which adapters' bases are told apart.",
    "stacks": "A regular expression found in the names of parameters that stack matrices of layers; a plan then says "
    "why one has no adapter.",
    "known code": "A tuple of Recognised: code of layers, and what a trace calls in its place.",
    "weight forms": "A subclass of BaseQuantization (base.sources): a form in which bases are stored in few bits. The "
    "last parts of the names of its tensors are signs of the feature.",
    "stored weights": "Returns a checkpoint's tensors by key with those of the form as a PackedTensor each, given "
    "where they are and what its configuration says, which is None if it has none.",
    "rounding": "Returns a float weight [out, in] as a given quantization of the form rounds it, in float32, given its "
    "name in messages.",
    "packed weights": "Returns a linear layer's weight as a core.graph.packed_weights.PackedWeight, given floats [out, "
    "in], which a given quantization of the form rounds, or a PackedTensor of the form; its name in messages; and "
    "whether the layer's weight is [in, out].",
    "trace patches": "A context over a model, in which its layers call the feature's operators while it is traced; it "
    "does nothing for a model without any.",
    "step patches": "A context in which a step is traced; attributes of its cache and of the cache's layers are signs.",
    "cache kinds": "A dict of format.cache_slots.StateKind by name, which is a sign, as is its attribute.",
    "cache layers": "A module for caches of transformers whose layers keep other kinds of state: `empty` and `fresh` "
    "make a cache and a layer like others, `keep` puts a state into a cache, and `longer_states` is a context over a "
    "model that notes which windows of inputs it keeps with one that is not read again. Signs are as for step patches.",
    "cache readers": "A set of operators of exports, each with the input whose memory an output may share.",
    "single tokens": "Returns whether transformers' code of a model is right for steps of a single token alone, by "
    "which a trace is then checked.",
    "operators": "A module that defines operators of graphs when it is imported; what reads a saved graph imports it.",
    "onnx operators": "A tuple of subclasses of DomainNode, to which the translation turns operators.",
    "noting passes": "A pass over a torch.fx graph that says of which layers the operators could not be made.",
    "mixing passes": "As a lowering pass, of operators that mix tokens as attention does; they are lowered first.",
    "lowering passes": "A pass over an ONNX model that replaces the translated operators by those of ONNX Runtime.",
    "cache passes": "A pass over an ONNX decoder whose fused layers read a cache that has its names.",
    "form passes": "A tuple of passes over an ONNX decoder whose rows are told apart: they give operators that earlier "
    "passes look for their last form.",
    "rows": "CachedLayers of a model: those that keep something else than keys and values, in a graph whose rows have "
    "lengths of their own.",
    "storing passes": "A pass over an ONNX model that runs once weights are stored as the plan says.",
    "weight formats": "Returns a plan of quantization of a trace with what the feature's weights differ in.",
    "quantized weights": "Stores the weights of an ONNX model as a plan says, and returns what is Quantized.",
    "rounded weights": "Reads what an export's directory holds of a trace's quantized weights: parameters by the ids "
    "of the trace's own, and how many values are quantized.",
    "float weights": "Lets an export's operators multiply by floats, in place, for verification.",
    "arrangements": "Says how a node stores the matrices of one of its inputs, as an Arrangement, or None; folding "
    "asks it.",
    "acting tokens": "A module for adapters that act on some tokens, as their configuration's `acts_from` says: "
    "`insert_mask` adds the node of a mask to a graph, `masks` finds these nodes, whose `starts` may be given, "
    "`first_columns` says where each row of ids begins to be acted on, `problems` why a trace cannot have "
    "one, and `start_in_prompt` where a served prompt begins to be.",
    # the core asks for these parts only for what it does not know itself
    "call patches": "A context over a transformers model and the inputs of its trace, in which it is called.",
    "own traces": "A function that captures and checks a draft by the inputs that the feature knows, as "
    "core.tracing.capture.trace_both_modes does.",
    "trace options": "A Mapping from options of `trace` to functions of the model, the tensors and constants of its "
    "example, and the option's value; each returns the tensors and constants to trace with.",
    "input facts": "A Mapping from keys of an export's manifest to classes of format.input_facts.InputFacts.",
    "main inputs": "Names of inputs of which a model's forward takes one in the place of token ids.",
    "input axes": "A Mapping from inputs to the names of their axes, of which the first alone varies, unless a trace "
    "of the feature's own lets more vary.",
    "step inputs": "A tuple of format.input_names.StepInput: what a decoder's step may take beside its ids.",
    "step examples": "A module of what a decoder's step takes beside its ids: `examples_beside` gives an example of "
    "both for a model, ids and mask; `drawn_beside` draws both for a trace, a case of verification and a generator.",
    "optional inputs": "A pass over an ONNX decoder that lets step inputs be left out; nothing is folded after it.",
    "given rows": "A subclass of run.engine.session_decoders.GivenRows: what rows begin with in the place of tokens, "
    "and the prompts of the embeddings that `generate` was given.",
    "program graphs": "A function of a model's configuration and an export's ONNX models by the names of their files, "
    "that returns more of them, over the same weights, which other programs run in the place of `model.onnx`.",
    "program files": "A function of an export's directory, the model's configuration, the ONNX models by the names of "
    "their files and what genai_config.json holds, which it changes; it writes what other programs read beside them.",
    "companion files": "Returns what makes a companion's inputs of prompts, which is saved in the place of the "
    "tokenizer, given that and where it may have come from; None if there is nothing.",
    "given prompts": "A class as run.generate.prompt_answers.GivenPrompts, whose `of` takes an open export whose "
    "companions' names are signs, and returns None if they read no prompts.",
    "export options": "A dataclass as cli.export.TraceOptions: options of the command for models of some kind.",
    "tasks": "A tuple of format.tasks.Task: tasks that models can be traced for.",
    "companions": "A function of a traced decoder, that returns traces of what its model runs beside it, by the names "
    "of their files, over the same parameters.",
    "companion checks": "A class as exporters.verify.together.CompanionCheck: gives inputs of companions, whose "
    "names are signs, and compares what they and the decoder make together.",
    "example inputs": "A function of a model, the name of its main input and a generator, that returns an example of "
    "the input, or None where it knows none (core.tracing.inputs.samples); asked for by the name, as a sign.",
    "encoder inputs": "A subclass of run.generate.encoder_inputs.EncoderInputs: reads prompts that are not texts.",
    "generate options": "A dataclass as cli.generate.PromptOptions: options of the command for such prompts.",
    "constraints": "A class of run.generate.constraints.Constraints, made of a tokenizer, or None, and a decoder's "
    "limits.",
    "proposers": "A class of run.generate.answer_row.Proposer, made of nothing: proposes next tokens of rows, which a "
    "step verifies.",
    "request fields": "Models of fields by the name of the request of OpenAI's protocol that has them (the decorator "
    "with_features), and its hooks (service.protocols.openai.answer_plan).",
    "attachments": "A class as service.engines.AttachmentReader, whose `of` takes an open export, whose companions are "
    "signs, and the service's settings.",
    "serve options": "A dataclass whose fields are options of the service, for models of some kind; it is among `more` "
    "of the settings.",
    "chat templates": "A class whose `of` reads what a tokenizer's template of chats does, for the hooks of requests; "
    "its text is a line of the log.",
    "inferred tasks": "A function of the names of an adapter and a base, that returns the task that their files show "
    "and what trace is given for it, or None.",
    "scores": "A function of the configuration of a model with one output and its name, which notes there what makes a "
    "score of it.",
    "appended modules": "A function of a model, its task, which is a sign of the feature, and the source that trace is "
    "given, that returns AppendedModules (core.tracing.draft).",
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
