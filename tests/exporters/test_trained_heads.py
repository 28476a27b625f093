"""Adapters that train a head or biases, as data of an export: PEFT's model with each, the base bit for bit without."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from peft_oracle import peft_model
from safetensors.torch import load_file, save_file
from tiny_models import text_batch, tiny_model
from torch import Tensor
from traces import relative_error

from gralora_fx import GraloraModel, TracedModel, trace
from gralora_fx.errors import CheckpointError, ExportError, MergeError, ServingError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx, merge_checkpoint, to_lora, verify_onnx
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.adapter_file import read_record, read_tensors, record_of, write_tensors
from gralora_fx.serving import OrtModel, load

GRALORA = {"r": 4, "gralora_k": 2, "alpha": 8}
LORA = {"method": "LORA", "r": 8, "lora_alpha": 16}
CACHED = "text-generation-with-past"
PIXELS = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
TEXTS = text_batch(4, 9)


@functools.cache
def classifier(name: str, labels: int = 3) -> Callable[[], Any]:
    return lambda: tiny_model(name, num_labels=labels)


def trained(make: Callable[[], Any], directory: Path, seed: int = 1, **fields: Any) -> peft.PeftModel:
    """Return a model that PEFT adapted, whose head and biases moved as in training, and its checkpoint."""
    wrapped = peft_model(make(), seed, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in name or name.endswith("bias")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(directory))
    return wrapped


@functools.cache
def traced_once(make: Callable[[], Any], task: str | None) -> TracedModel:
    return trace(make(), task=task)


def traced(make: Callable[[], Any], task: str | None = None) -> TracedModel:
    """Return a trace for a test to change."""
    return copy.deepcopy(traced_once(make, task))


def exported(make: Callable[[], Any], folder: Path, task: str | None = None, **options: Any) -> GraloraModel:
    """Return the model with the adapter `folder / "a"`, exported to `folder / "onnx"`."""
    model = GraloraModel.from_pretrained(traced(make, task), folder / "a", adapter_name="a")
    export_onnx(model, folder / "onnx", **options)
    return model


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def served_logits(model: OrtModel, adapter: Any, inputs: dict[str, Tensor]) -> Tensor:
    return torch.as_tensor(model(adapter=adapter, **inputs).logits)


# -- parity with PEFT --------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-all-biases": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "roberta": ("roberta", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "vit": ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "bias": "own"}),
}


def fields_of(case: str, sizes: dict[str, Any]) -> dict[str, Any]:
    fields = {**sizes, **CASES[case][1]}
    if fields.get("bias") == "own":
        fields["bias"] = "lora_only" if sizes.get("method") == "LORA" else "gralora_only"
    return fields


@pytest.fixture(scope="module")
def base_logits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tensor]:
    """Compute what the export of a classifier without adapters gives."""

    @functools.cache
    def logits(name: str) -> Tensor:
        path = tmp_path_factory.mktemp("base") / "onnx"
        export_onnx(traced(classifier(name)), path, verify=False)
        return served_logits(load(path), None, PIXELS if name == "vit" else TEXTS)

    return logits


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *(("bert", mode) for mode in ("data", "inputs")),
        ("bert-all-biases", "data"),
        ("roberta", "data"),
        ("vit", "data"),
    ],
)
def test_heads_and_biases_are_pefts(case: str, mode: Any, tmp_path: Path, base_logits: Callable[[str], Tensor]) -> None:
    name = CASES[case][0]
    make, inputs = classifier(name), PIXELS if name == "vit" else TEXTS
    models = {
        "a": trained(make, tmp_path / "a", 1, **fields_of(case, GRALORA)),
        "b": trained(make, tmp_path / "b", 2, **fields_of(case, LORA)),
    }
    exported(make, tmp_path, adapters=mode, verify=False)
    export_adapter(tmp_path / "b", tmp_path / "onnx", "b")
    expected: dict[str | None, Tensor] = {adapter: logits_of(model, inputs) for adapter, model in models.items()}
    expected[None] = base_logits(name)
    served = load(tmp_path / "onnx")
    assert relative_error(expected["a"], expected["b"]) > 0.1  # the heads differ
    for adapter, logits in expected.items():
        assert relative_error(served_logits(served, adapter, inputs), logits) < 1e-5
    assert np.array_equal(served_logits(served, None, inputs), expected[None])
    if mode == "data":
        rows = ["b", None, "a", "b"]
        found = served_logits(served, rows, inputs)
        whole = torch.stack([expected[adapter][row] for row, adapter in enumerate(rows)])
        assert relative_error(found, whole) < 1e-5
        assert torch.equal(found[1], expected[None][1])


def sequence_classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=101, pad_token_id=0, num_labels=3)
    return transformers.LlamaForSequenceClassification(config).eval()


def test_a_decoders_score_layer(tmp_path: Path) -> None:
    fields = {**LORA, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    wrapped = trained(sequence_classifier, tmp_path / "a", **fields)
    exported(sequence_classifier, tmp_path, "text-classification", adapters="data", verify=False)
    assert relative_error(served_logits(load(tmp_path / "onnx"), "a", TEXTS), logits_of(wrapped, TEXTS)) < 1e-5


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["mlp"], "bias": "all"}),
    ],
)
def test_decoders_are_verified_with_them(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    trained(lambda: tiny_model(name), tmp_path / "a", **{**GRALORA, **fields})
    exported(lambda: tiny_model(name), tmp_path, CACHED, adapters="data")  # which compares each row's logits and tokens
    sites = read_record(tmp_path / "onnx" / "adapters" / "a.onnx_adapter").sites
    assert any(site.endswith(("lm_head", "mlp.c_fc")) for site in sites)


def test_layers_of_an_encoder_decoder(tmp_path: Path) -> None:
    """The paths of BART's layers look like those of its cache."""
    fields = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["fc1"], "bias": "gralora_only"}
    make = functools.partial(tiny_model, "bart", encoder_layers=1, decoder_layers=1)
    trained(make, tmp_path / "a", **{**GRALORA, **fields})
    exported(make, tmp_path, "text2text-generation-with-past", adapters="data")
    assert (tmp_path / "onnx" / "adapters" / "a.onnx_adapter").is_file()


@pytest.mark.parametrize("options", [{"quantize": "int4", "block_size": 16}, {"precision": "fp16"}])
def test_other_precisions_pass_verification(options: dict[str, Any], tmp_path: Path) -> None:
    trained(classifier("bert"), tmp_path / "a", **fields_of("bert-all-biases", GRALORA))
    exported(classifier("bert"), tmp_path, adapters="data", **options)


# -- one export, looked at ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraloraModel, OrtModel]:
    folder = tmp_path_factory.mktemp("heads")
    fields = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "gralora_only"}
    trained(classifier("bert"), folder / "a", **GRALORA, **fields)
    trained(classifier("bert"), folder / "b", 2, **LORA, **{**fields, "bias": "lora_only"})
    model = exported(classifier("bert"), folder, adapters="data", verify=False)
    export_adapter(folder / "b", folder / "onnx", "b")
    return folder, model, load(folder / "onnx")


def test_the_tensors_are_those_of_the_contract(bert: tuple[Path, GraloraModel, OrtModel]) -> None:
    folder, _, served = bert
    shapes = {value.name: value.shape for value in served.session.get_overridable_initializers()}
    query = "bert.encoder.layer.0.attention.self.query"
    assert {name.rpartition(".")[2]: shape for name, shape in shapes.items() if name.startswith("classifier.")} == {
        "gralora_A_general": [32, "classifier.hybrid_r"],
        "gralora_B_general": ["classifier.hybrid_r", 3],
        "gralora_bias": [3],
    }
    assert shapes[f"{query}.gralora_bias"] == [32]
    assert shapes[f"{query}.gralora_A"][:2] == [2, 16]
    inputs = read_manifest(folder / "onnx").adapter_inputs
    assert inputs is not None
    assert {site.path: (site.form, site.has_bias) for site in inputs.sites}["classifier"] == ("whole", True)
    record = read_record(folder / "onnx" / "adapters" / "a.onnx_adapter")
    assert record.shapes["classifier.gralora_B_general"] == (3, 3)
    assert (record.r, record.hybrid_r) == (4, 0)  # the head's rank is that of the weight


def test_few_nodes_are_added(bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path) -> None:
    folder, model, served = bert
    with model.disable_adapter():
        export_onnx(model, tmp_path / "base", verify=False)
    ours, theirs = (
        Counter(node.op_type for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node)
        for path in (folder / "onnx", tmp_path / "base")
    )
    added = ours - theirs
    added.pop("Constant", None)
    assert not theirs - ours
    assert added["Adapter_lora"] == 1
    assert sum(added.values()) <= 8 * len(served.manifest.adapter_inputs.sites)  # type: ignore[union-attr]


def test_a_limit_of_ranks_is_not_of_heads(bert: tuple[Path, GraloraModel, OrtModel]) -> None:
    folder, _, _ = bert
    assert served_logits(load(folder / "onnx", max_rank=8), "b", TEXTS).shape == (4, 3)
    with pytest.raises(ServingError, match="rank 8, above the limit of 7"):
        served_logits(load(folder / "onnx", max_rank=7), "b", TEXTS)


def test_a_weighted_sum_is_that_of_the_heads_too(bert: tuple[Path, GraloraModel, OrtModel]) -> None:
    folder, model, served = bert
    served.mix_adapters("sum", {"a": 0.25, "b": 0.75})
    second = GraloraModel.from_pretrained(traced(classifier("bert")), folder / "b", adapter_name="b")
    merged = tiny_model("bert", num_labels=3)
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for name, weight, of in (("a", 0.25, model), ("b", 0.75, second)):
            adapter = of.adapter(name)
            for path in adapter.factors:
                parameters[f"{path}.weight"] += weight * of.delta_weight(path, name)
            for owned in adapter.copies.values():
                for base, value in owned.items():
                    parameters[base] += weight * (value - of.traced.tree.parameters[base])
    assert relative_error(served_logits(served, "sum", TEXTS), logits_of(merged, TEXTS)) < 1e-5
    served.unload_adapter("sum")


def test_as_plain_lora_it_is_the_same(bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path) -> None:
    folder, _, served = bert
    to_lora(folder / "a", tmp_path / "lora")
    export_adapter(tmp_path / "lora", folder / "onnx", "converted")
    assert relative_error(served_logits(served, "converted", TEXTS), served_logits(served, "a", TEXTS)) < 1e-5


def test_another_head_than_the_models_fails_verification(
    bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path
) -> None:
    folder, _, _ = bert
    other = GraloraModel.from_pretrained(traced(classifier("bert")), folder / "a", adapter_name="a")
    assert verify_onnx(folder / "onnx", other, "quick").passed
    with torch.no_grad():
        next(iter(other.adapter("a").copies["classifier"].values())).add_(0.01)
    with pytest.raises(ExportError, match=r"another adapter than the model's 'a': classifier\.gralora_"):
        verify_onnx(folder / "onnx", other, "quick")


def test_a_manifest_without_forms_is_that_of_blocks(bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path) -> None:
    folder, _, _ = bert
    fields = json.loads((folder / "onnx" / "gralora_export.json").read_text())
    for site in fields["adapter_inputs"]["sites"]:
        del site["form"], site["has_bias"]
    (tmp_path / "gralora_export.json").write_text(json.dumps(fields))
    inputs = read_manifest(tmp_path).adapter_inputs
    assert inputs is not None
    assert {(site.form, site.has_bias) for site in inputs.sites} == {("blocks", False)}
    fields["adapter_inputs"]["sites"][0]["form"] = "diagonal"
    (tmp_path / "gralora_export.json").write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=r"adapter_inputs\.sites is .*, which no export writes"):
        read_manifest(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_head_of_another_size_is_refused(bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path) -> None:
    folder, _, _ = bert
    trained(classifier("bert", labels=5), tmp_path / "five", **fields_of("bert", LORA))
    with pytest.raises(
        ExportError,
        match=r"classifier\.weight has shape \[5, 32\], and the export's has \[3, 32\]: a head keeps its number",
    ):
        export_adapter(tmp_path / "five", folder / "onnx", "five")
    assert not (folder / "onnx" / "adapters" / "five.onnx_adapter").exists()


def test_parameters_that_the_export_does_not_take_are_refused(
    bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path
) -> None:
    folder, _, _ = bert
    fields = {"target_modules": ["query", "value"], "modules_to_save": ["pooler", "classifier"]}
    trained(classifier("bert"), tmp_path / "pooler", **LORA, **fields)
    with pytest.raises(ExportError, match=r"bert\.pooler\.dense\.weight: the export takes no values for it"):
        export_adapter(tmp_path / "pooler", folder / "onnx", "pooler")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert", {"modules_to_save": ["word_embeddings"]}, r"trains bert\.embeddings\.word_embeddings\.weight"),
        (
            "vit",
            {"bias": "all"},
            r"^no trained bias can be data at vit\.embeddings\.patch_embeddings\.projection: not a linear",
        ),
    ],
)
def test_other_parameters_are_refused_by_name(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    targets = ["q_proj"] if name == "vit" else ["query"]
    trained(classifier(name), tmp_path / "a", target_modules=targets, **GRALORA, **fields)
    with pytest.raises(ExportError, match=message):
        exported(classifier(name), tmp_path, adapters="data")
    assert not (tmp_path / "onnx").exists()


def test_damaged_biases_are_refused(bert: tuple[Path, GraloraModel, OrtModel], tmp_path: Path) -> None:
    folder, _, served = bert
    source, inputs = folder / "onnx" / "adapters" / "a.onnx_adapter", served.manifest.adapter_inputs
    assert inputs is not None
    fingerprint = served.manifest.base_fingerprint
    sound = read_tensors(source, read_record(source), inputs, fingerprint, ServingError)
    edits: dict[str, Callable[[dict[str, Any]], object]] = {
        r"classifier\.gralora_bias is missing": lambda tensors: tensors.pop("classifier.gralora_bias"),
        r"gralora_bias has shape \[4\] instead of \[3\]": lambda tensors: tensors.update(
            {"classifier.gralora_bias": np.zeros(4, np.float32)}
        ),
        r"gralora_bias holds values that are not finite": lambda tensors: tensors.update(
            {"classifier.gralora_bias": np.full(3, np.nan, np.float32)}
        ),
    }
    for number, (message, edit) in enumerate(edits.items()):
        tensors, file = dict(sound), tmp_path / f"{number}.onnx_adapter"
        edit(tensors)
        write_tensors(file, tensors)
        record = record_of(file, "a", tensors, {}, inputs, fingerprint)
        record_path(file).write_text(dataclasses.replace(record, name="a").to_json())
        with pytest.raises(ServingError, match=message):
            served.load_adapter("damaged", file)


@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_head_that_peft_saved_in_another_precision_is_the_bases_on_every_route(
    base: torch.dtype, saved: torch.dtype, tmp_path: Path
) -> None:
    head = tiny_model("llama").lm_head.weight.detach().clone()
    model = tiny_model("llama").to(base)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapter = peft.get_peft_model(tiny_model("llama").to(base), config)
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] = head.to(saved)
    save_file(tensors, file, metadata={"format": "pt"})
    traced = trace(model, task="text-generation-with-past")
    GraloraModel.from_pretrained(traced, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    export_onnx(traced, tmp_path / "onnx", verify=False)
    fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "folded")
    tensors["base_model.model.lm_head.base_layer.weight"] = 1.02 * head.to(saved)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"values are not those of the base's lm_head\.weight"):
        GraloraModel.from_pretrained(traced, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has other values than the base"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(MergeError, match=r"lm_head\.weight: the adapter holds values for it that are not the export's"):
        fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "other")
