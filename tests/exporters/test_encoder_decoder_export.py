"""Exported encoder-decoders: optimum's two graphs, which generate the tokens of the PyTorch model with their cache."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from peft_oracle import saved_by_peft
from tiny_models import WIDE
from tokenizers import Tokenizer, models
from torch import Tensor
from traces import fresh, fresh_trace
from transformers import PreTrainedModel, PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperProcessor

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, rewrite, trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.run.engine.encoder_decoder import EncoderDecoder
from gralora_fx.run.sessions.session import open_session
from gralora_fx.run.sessions.session_pair import EncoderDecoderSession
from gralora_fx.run.sessions.session_views import as_past, empty_past
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone

NAMES = ("t5", "bart", "whisper", "marian", "pegasus", "m2m_100", "blenderbot")
SPECIAL: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Exported:
    """A rewritten model, the same in transformers with folded weights, and its export."""

    name: str
    model: GraloraModel
    folded: PreTrainedModel
    path: Path


def task(name: str) -> str:
    return ("automatic-speech-recognition" if name == "whisper" else "text2text-generation") + "-with-past"


def sizes(name: str) -> dict[str, Any]:
    """Fields of a model's configuration; T5, which takes longest, has one layer, BART has two for what counts them."""
    return {**SPECIAL, **WIDE[name], **({"num_layers": 1} if name == "t5" else {})}


def base(name: str) -> TracedModel:
    return fresh_trace(name, task=task(name), **sizes(name))


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    return functools.cache(lambda name: export(name, tmp_path_factory.mktemp(name) / "onnx"))


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, export_of: Callable[[str], Exported]) -> Exported:
    return export_of(request.param)


@pytest.fixture(scope="module")
def bart(export_of: Callable[[str], Exported]) -> Exported:
    return export_of("bart")


def export(name: str, path: Path) -> Exported:
    source, traced = fresh(name, task=task(name), **sizes(name))
    config = GraloraConfig(r=4, alpha=4, init_weights=False, target_modules="all-linear")
    model = rewrite(traced, config)
    report = export_onnx(model, path)
    assert report.verification is not None
    assert report.verification.passed
    folded = merge(model).tree.parameters
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            parameter.copy_(folded[key])
    return Exported(name, model, source, path)


def read(name: str, side: str = "right") -> dict[str, Tensor]:
    """Make the encoder's inputs: three texts of unequal length, or features."""
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 40, generator=generator)}
    ids = torch.randint(3, 100, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, 3):
        mask[row, slice(3 * row) if side == "left" else slice(-3 * row, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def names(values: Any) -> dict[str, list[Any]]:
    return {value.name: list(value.shape) for value in values}


def greedy_tokens(session: EncoderDecoderSession, source: Mapping[str, Tensor], start: Tensor, steps: int) -> Tensor:
    """Return the tokens of a whole batch, as a plain session runs it: padded."""
    feed = {name: value.numpy() for name, value in source.items()}
    hidden, ids, past = session.encode(feed), start.numpy(), None
    found = []
    for _ in range(steps):
        results = session.step(ids, hidden, feed.get("attention_mask"), past)
        ids, past = results["logits"][:, -1:].argmax(-1), as_past(results)
        found.append(torch.from_numpy(ids))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_tokens_of_padded_batches_are_those_of_generate(exported: Exported, side: str) -> None:
    source = read(exported.name, side)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    start = torch.full((3, 2 if exported.name == "whisper" else 1), 1)
    if exported.name == "whisper":
        start[:, 1] = 7
    expected = exported.folded.generate(**source, decoder_input_ids=start, **options)
    tokens = greedy_tokens(open_session(exported.path), source, start, 12)
    assert tokens.tolist() == expected[:, -12:].tolist()
    assert len(set(tokens.flatten().tolist())) > 1


def test_the_encoder_and_a_first_step_are_the_models(exported: Exported) -> None:
    source, ids = read(exported.name), torch.randint(3, 100, (3, 5))
    with torch.no_grad():
        expected = exported.folded(**source, decoder_input_ids=ids)
    outputs = load(exported.path)(**source, decoder_input_ids=ids)
    for name in ("logits", "encoder_last_hidden_state"):
        largest = getattr(expected, name).abs().max()
        kept = source["attention_mask"].bool() if name != "logits" and "attention_mask" in source else slice(None)
        assert (outputs[name][kept] - getattr(expected, name)[kept]).abs().max() <= 1e-4 * max(1.0, largest)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_checkpoint_of_peft_generates_as_in_peft(name: str, tmp_path: Path) -> None:
    fields = {"target_modules": "all-linear", "r": 4, "gralora_k": 2, "alpha": 4}
    wrapped = saved_by_peft(name, tmp_path / "adapter", sizes=sizes(name), **fields)
    model = GraloraModel.from_pretrained(base(name), tmp_path / "adapter")
    export_onnx(model, tmp_path / "onnx")
    source, start = read(name), torch.tensor([[1, 7]] * 3)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    expected = wrapped.generate(**source, decoder_input_ids=start, **options)
    assert greedy_tokens(open_session(tmp_path / "onnx"), source, start, 10).equal(expected[:, -10:])


def test_a_processor_of_speech_is_saved_in_the_files_that_transformers_js_reads(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)
    report = export_onnx(base("whisper"), tmp_path / "onnx", tokenizer=processor, verify=False)
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= set(report.files)
    assert json.loads((tmp_path / "onnx" / "preprocessor_config.json").read_text())["feature_size"] == 8


def test_what_the_engine_refuses_is_an_error_of_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = base("t5")
    export_onnx(traced, tmp_path / "onnx", verify=False)

    def full(*_: Any, **__: Any) -> int:
        raise ServingError("all rows are in use")

    monkeypatch.setattr(EncoderDecoder, "open", full)
    with pytest.raises(ExportError, match=r"all rows are in use \(greedy tokens\)"):
        verify_onnx(tmp_path / "onnx", traced, "quick")


def test_files_and_names_are_optimums(bart: Exported) -> None:
    assert {file.name for file in bart.path.iterdir()} == {
        "config.json",
        "decoder_model_merged.onnx",
        "decoder_model_merged.onnx_data",
        "encoder_model.onnx",
        "encoder_model.onnx_data",
        "generation_config.json",
        "gralora_export.json",
    }
    session = open_session(bart.path)
    text = ["batch_size", "encoder_sequence_length"]
    assert list(names(session.encoder.get_inputs())) == ["input_ids", "attention_mask"]
    assert names(session.encoder.get_outputs())["last_hidden_state"][2] == 32
    inputs, outputs = names(session.decoder.get_inputs()), names(session.decoder.get_outputs())
    pairs = [f"{n}.{part}.{kind}" for n in (0, 1) for part in ("decoder", "encoder") for kind in ("key", "value")]
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "encoder_attention_mask": text,
        "encoder_hidden_states": [*text, 32],
        **{
            f"past_key_values.{pair}": ["batch_size", 4, f"past_{pair.split('.')[1]}_sequence_length", 8]
            for pair in pairs
        },
        "use_cache_branch": [1],
    }
    assert outputs["logits"] == ["batch_size", "sequence_length", 101]
    assert list(outputs)[1:] == [f"present.{pair}" for pair in pairs]
    assert outputs["present.0.encoder.key"] == ["batch_size", 4, "encoder_sequence_length", 8]
    assert outputs["present.0.decoder.key"][2] == "past_sequence_length + sequence_length"


def test_speech_has_no_mask_and_a_length_of_its_own(export_of: Callable[[str], Exported]) -> None:
    session = open_session(export_of("whisper").path)
    assert list(names(session.encoder.get_inputs())) == ["input_features"]
    assert "encoder_attention_mask" not in names(session.decoder.get_inputs())
    assert names(session.decoder.get_inputs())["encoder_hidden_states"] == ["batch_size", 20, 32]


def test_without_the_flag_no_past_is_read(bart: Exported) -> None:
    session = open_session(bart.path)
    assert isinstance(session, EncoderDecoderSession)
    source = {name: value.numpy() for name, value in read("bart").items()}
    hidden, ids = session.encode(source), np.array([[5, 6], [7, 8], [9, 3]])
    expected = session.step(ids, hidden, source["attention_mask"])
    noise = {name: np.ones((3, 4, 1, 8), np.float32) for name in empty_past(session.decoder.get_inputs(), 3)}
    feed = {"input_ids": ids, "encoder_hidden_states": hidden, "encoder_attention_mask": source["attention_mask"]}
    outputs = session.decoder.run(None, {**feed, **noise, "use_cache_branch": np.array([False])})
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(outputs, expected.values(), strict=True))


def test_with_the_flag_the_encoders_output_is_not_read_again(bart: Exported) -> None:
    session = open_session(bart.path)
    source = {name: value.numpy() for name, value in read("bart").items()}
    hidden, ids = session.encode(source), np.array([[5], [7], [9]])
    past = as_past(session.step(ids, hidden, source["attention_mask"]))
    expected = session.step(ids, hidden, source["attention_mask"], past)
    outputs = session.step(ids, np.zeros_like(hidden), source["attention_mask"], past)
    assert np.array_equal(outputs["logits"], expected["logits"])
    kept = [name for name in outputs if ".encoder." in name]
    assert all(np.array_equal(outputs[name], past[name.replace("present", "past_key_values")]) for name in kept)


def test_the_projections_of_the_encoders_output_run_in_the_first_step_only(bart: Exported) -> None:
    graph = onnx.load(str(bart.path / "decoder_model_merged.onnx"), load_external_data=False).graph
    branches = [a.g for node in graph.node if node.op_type == "If" for a in node.attribute if a.name == "else_branch"]
    assert [sum(node.op_type == "MatMul" for node in branch.node) for branch in branches] == [2, 2]
    readers = [node.op_type for node in graph.node if "encoder_hidden_states" in node.input]
    assert "MatMul" not in readers


def test_verification_finds_a_wrong_weight(bart: Exported, tmp_path: Path) -> None:
    other = base("bart")  # without the adapter
    shutil.copytree(bart.path, tmp_path / "onnx")
    path = tmp_path / "onnx" / "gralora_export.json"
    unknown = {"base_fingerprint": None, "adapters": {}}  # else it is refused
    path.write_text(json.dumps({**json.loads(path.read_text()), **unknown}))
    report = verify_onnx(tmp_path / "onnx", other)
    assert not report.passed
    assert next(check for check in report.tensors if check.name == "greedy tokens").argmax_agreement != 1.0


def test_the_manifest_tells_the_two_graphs_apart(bart: Exported) -> None:
    manifest = json.loads((bart.path / "gralora_export.json").read_text())
    assert manifest["task"] == "text2text-generation-with-past"
    assert manifest["logits"] == "all"
    assert list(manifest["inputs"]) == ["decoder_model_merged", "encoder_model"]
    assert list(manifest["outputs"]["encoder_model"]) == ["last_hidden_state"]
    assert manifest["verification"]["passed"] is True
    assert len(manifest["sites"]) == len(bart.model.sites)


def test_a_decoder_that_reads_the_encoders_layers_cannot_be_split(tmp_path: Path) -> None:
    model = base("bart")

    def reads_more(graph_module: torch.fx.GraphModule) -> None:
        graph = graph_module.graph
        ids, logits = (next(n for n in graph.nodes if n.name == name) for name in ("input_ids", "add_25"))
        with graph.inserting_before(graph.output_node()):
            first = graph.call_function(torch.ops.aten.select.int, (ids, 1, 0))
            first.meta["val"] = ids.meta["val"][:, 0]
            summed = graph.call_function(
                torch.ops.aten.add.Tensor,
                (logits, graph.call_function(torch.ops.aten.reshape.default, (first, [-1, 1, 1]))),
            )
        logits.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not summed)

    with pytest.raises(ExportError, match=r"depends on input_ids by more than .*it cannot be split"):
        export_onnx(model.with_pass(reads_more), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_weights_of_a_branch_stay_in_the_directory_too(tmp_path: Path) -> None:
    value = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="../secret.bin")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "branch", [], [out], [value])
    node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [1])
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [flag], [result]), ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="outside its directory"):
        open_session(tmp_path)


def test_sessions_are_onnx_runtimes(bart: Exported) -> None:
    session = open_session(bart.path)
    assert isinstance(session.encoder, onnxruntime.InferenceSession)
    assert [value.name for value in session.get_inputs()][:3] == ["input_ids", "attention_mask", "decoder_input_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8", "texts": ["a"], "tokenizer": "none"}, "is an encoder-decoder's with one"),
    ],
)
def test_a_trace_of_its_own_inputs_whose_task_tells_no_cache_is_refused_by_the_cache(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model, cached = fresh("t5", task=task("t5"), **sizes("t5"))
    traced = trace(model, dict(cached.example_inputs))
    assert traced.task == "text2text-generation"
    adapted = rewrite(traced, GraloraConfig(r=4, gralora_k=2, target_modules=["q"]))
    with pytest.raises(ExportError, match=message):
        export_onnx(adapted, tmp_path / "onnx", **options)
    assert not (tmp_path / "onnx").exists()
