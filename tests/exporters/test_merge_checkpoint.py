"""`merge_checkpoint`: the files are those of PEFT's merged model, other bytes are the base's; clear refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_oracle import peft_model, perturb_saved_modules, saved_by_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import text_batch, tiny_model
from transformers import PreTrainedModel

from gralora_fx.base.sources import rewriting
from gralora_fx.errors import CheckpointError, ConfigError, ExportError, GraloraError, MergeError
from gralora_fx.exporters import merge_checkpoint

WEIGHTS, INDEX = "adapter_model.safetensors", "model.safetensors.index.json"
GRALORA: dict[str, Any] = {"r": 4, "gralora_k": 2, "alpha": 6, "target_modules": "all-linear"}
LORA: dict[str, Any] = {"method": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def saved(
    name: str, directory: Path, dtype: torch.dtype = torch.float32, shards: str | None = "20KB", **sizes: Any
) -> Path:
    """Return a tiny model in several shards, or in one file."""
    limit = {} if shards is None else {"max_shard_size": shards}
    tiny_model(name, **sizes).to(dtype).save_pretrained(directory / "base", **limit)
    return directory / "base"


def adapter(base: Path, directory: Path, **fields: Any) -> Path:
    """Return an adapter of a saved model, trained in float32 by PEFT."""
    wrapped = peft_model(loaded(base), **fields)
    perturb_saved_modules(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(directory / "adapter"))
    return directory / "adapter"


def loaded(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Return a saved model, in which transformers misses nothing."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_class = getattr(transformers, config.architectures[0])
    model, info = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def merged_by_peft(base: Path, adapter: Path, directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(loaded(base, dtype), str(adapter), autocast_adapter_dtype=False)
    model.merge_and_unload().save_pretrained(directory / "peft")
    return tensors_of(directory / "peft")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**text_batch())[0].float()
    return result


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", GRALORA),
        ("llama", {**GRALORA, "gralora_k": 4, "hybrid_r": 4, "layers_to_transform": [1]}),
        ("llama", LORA),
        ("llama", {**LORA, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("gpt2", {**GRALORA, "hybrid_r": 2}),
        ("gpt2", {**LORA, "bias": "all"}),
        ("bert", {**GRALORA, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
        ("bert", {**GRALORA, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
        ("t5", {**GRALORA, "target_modules": ["q", "v", "wo"]}),
        ("mixtral", {**GRALORA, "target_modules": ["q_proj", "o_proj"]}),
    ],
)
def test_tensors_are_those_of_pefts_merge(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    base = saved(name, tmp_path)
    directory = adapter(base, tmp_path, **fields)
    before, threads = {file.name: file.read_bytes() for file in base.iterdir()}, torch.get_num_threads()
    report = merge_checkpoint(base, directory, tmp_path / "merged")
    assert torch.get_num_threads() == threads
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    ours, theirs = tensors_of(tmp_path / "merged"), merged_by_peft(base, directory, tmp_path, torch.float32)
    assert ours.keys() == theirs.keys()
    originals = tensors_of(base)
    for key, value in theirs.items():
        assert close(ours[key], value, 1e-6), key
        if key not in (*report.merged, *report.replaced):
            assert torch.equal(ours[key], originals[key]), key
    assert any(not torch.equal(ours[key], originals[key]) for key in ours)
    assert {p.name for p in (tmp_path / "merged").iterdir()} == set(before)
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as one, safe_open(tmp_path / "merged" / file.name, "pt") as other:
            assert one.metadata() == other.metadata()
            assert one.offset_keys() == other.offset_keys()
    assert (tmp_path / "merged" / INDEX).read_bytes() == (base / INDEX).read_bytes()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_the_result_computes_what_the_adapted_model_computes(name: str, shards: str | None, tmp_path: Path) -> None:
    base = saved(name, tmp_path, shards=shards)
    directory = adapter(base, tmp_path, **GRALORA)
    merge_checkpoint(base, directory, tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(loaded(base), str(directory)).eval()
    assert close(outputs(loaded(tmp_path / "merged")), outputs(adapted))
    assert not close(outputs(adapted), outputs(loaded(base)), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_rounded_once_to_the_bases_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved("llama", tmp_path, dtype)
    directory = adapter(base, tmp_path, **GRALORA)
    merge_checkpoint(base, directory, tmp_path / "merged")
    exact = peft.PeftModel.from_pretrained(loaded(base, torch.float64), str(directory), autocast_adapter_dtype=False)
    exact = exact.double().merge_and_unload().state_dict()
    ours = tensors_of(tmp_path / "merged")
    for key, value in ours.items():
        assert value.dtype == dtype
        wide = exact[key]
        step = torch.finfo(dtype).eps * wide.abs().clamp(min=torch.finfo(dtype).tiny)
        assert bool(((value.double() - wide).abs() <= step * 0.51 + 1e-7 * wide.abs().max()).all()), key


@pytest.mark.parametrize("block", [1, 40, 100])
def test_rows_are_folded_in_pieces_of_any_size(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("gpt2", tmp_path, torch.bfloat16)
    directory = adapter(base, tmp_path, **{**GRALORA, "gralora_k": 4, "hybrid_r": 2})
    merge_checkpoint(base, directory, tmp_path / "whole")
    monkeypatch.setattr(rewriting, "BLOCK", block)
    monkeypatch.setattr(rewriting, "COPIED", 1000)
    monkeypatch.delattr("os.copy_file_range", raising=False)
    merge_checkpoint(base, directory, tmp_path / "pieces")
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "pieces")
    assert all(close(one[key].float(), other[key].float(), 0.01) for key in one)
    assert sum(not torch.equal(one[key], other[key]) for key in one) <= 2  # a sum in another order, rounded


def test_an_encoder_saved_without_its_prefix_takes_an_adapter_of_a_classifier(tmp_path: Path) -> None:
    """The base lacks the head, which the adapter brings, and its keys lack the prefix of the adapter's paths."""
    whole = tiny_model("bert", num_labels=3)
    whole.base_model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    unlabelled = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
    (tmp_path / "base" / "config.json").write_text(json.dumps(unlabelled))
    wrapped = peft_model(whole, **{**GRALORA, "target_modules": ["query"], "task_type": "SEQ_CLS"})
    perturb_saved_modules(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.added == ("classifier.bias", "classifier.weight")
    assert "encoder.layer.0.attention.self.query.weight" in report.merged
    assert len(report.config_changes) == 2
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert close(outputs(again), outputs(wrapped))
    assert type(loaded(tmp_path / "merged")).__name__ == "BertForSequenceClassification"


def test_an_adapter_of_the_bare_model_goes_into_files_with_a_prefix(tmp_path: Path) -> None:
    base = saved("bert", tmp_path)
    wrapped = peft_model(tiny_model("bert").base_model, **{**GRALORA, "target_modules": ["key"]})
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.merged[0] == "bert.encoder.layer.0.attention.self.key.weight"
    assert close(outputs(transformers.AutoModel.from_pretrained(tmp_path / "merged")), outputs(wrapped))


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize(
    ("name", "fields", "added"),
    [
        ("llama", {"target_modules": ["lm_head", "q_proj"]}, ("lm_head.weight",)),
        ("gpt2", {"target_modules": ["lm_head"]}, ("lm_head.weight",)),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ("lm_head.weight",)),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, ("lm_head.weight",)),
    ],
)
def test_a_tied_weight_is_untied(
    name: str, fields: dict[str, Any], added: tuple[str, ...], shards: str | None, tmp_path: Path
) -> None:
    base = saved(name, tmp_path, shards=shards, tie_word_embeddings=True, vocab_size=104)
    directory = adapter(base, tmp_path, **{**GRALORA, **fields})
    report = merge_checkpoint(base, directory, tmp_path / "merged")
    assert report.added == added
    assert "tie_word_embeddings is false" in report.details
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    adapted = peft.PeftModel.from_pretrained(loaded(base), str(directory)).eval()
    result = loaded(tmp_path / "merged")
    assert close(outputs(result), outputs(adapted))
    if "modules_to_save" not in fields:
        assert torch.equal(result.get_input_embeddings().weight, loaded(base).get_input_embeddings().weight)
    if shards:
        index = json.loads((tmp_path / "merged" / INDEX).read_text())
        assert index["weight_map"].keys() == tensors_of(tmp_path / "merged").keys()
        sizes = [value.nbytes for value in tensors_of(tmp_path / "merged").values()]
        assert index["metadata"]["total_size"] == sum(sizes)


def test_a_weight_that_is_always_tied_is_refused(tmp_path: Path) -> None:
    base = saved("t5", tmp_path, vocab_size=104)
    directory = adapter(base, tmp_path, **{**GRALORA, "target_modules": ["lm_head", "q"]})
    with pytest.raises(CheckpointError, match=r"T5ForConditionalGeneration ties lm_head.weight and shared.weight"):
        merge_checkpoint(base, directory, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_of_one_name_in_the_model_that_differ_in_the_files_stay_as_they_are(tmp_path: Path) -> None:
    """As of T5 v1.1: its class ties the head, its files have another one, and transformers takes the files'."""
    base = saved("t5", tmp_path, vocab_size=104, shards=None)
    edit(base / "model.safetensors", **{"lm_head.weight": torch.randn(104, 32)})
    directory = adapter(base, tmp_path, **{**GRALORA, "target_modules": ["lm_head", "q"]})
    report = merge_checkpoint(base, directory, tmp_path / "merged")
    assert "lm_head.weight" in report.merged
    assert (report.added, report.config_changes) == ((), ())
    theirs = merged_by_peft(base, directory, tmp_path, torch.float32)
    ours = tensors_of(tmp_path / "merged")
    assert all(close(ours[key], value, 1e-6) for key, value in theirs.items())


def test_other_files_are_copied_and_weights_in_other_formats_are_named(tmp_path: Path) -> None:
    base = saved("llama", tmp_path)
    kept = ("tokenizer.json", "training_args.bin", "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md")
    dropped = ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "consolidated.safetensors", "adapter_config.json")
    for name in (*kept, *dropped):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = merge_checkpoint(base, _plain(tmp_path), tmp_path / "merged")
    assert sorted(report.left_out) == sorted(dropped)
    assert all((tmp_path / "merged" / name).read_text() == name for name in kept)
    assert not any((tmp_path / "merged" / name).exists() for name in dropped)
    assert "pytorch_model.bin" in report.details


def _plain(directory: Path) -> Path:
    saved_by_peft("llama", directory / "adapter", **GRALORA)
    return directory / "adapter"


def test_overflow_of_half_precision_is_refused(tmp_path: Path) -> None:
    base = saved("llama", tmp_path, torch.float16)
    directory = adapter(base, tmp_path, **{**GRALORA, "alpha": 10_000_000})
    with pytest.raises(MergeError, match="not finite in float16"):
        merge_checkpoint(base, directory, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


SITE = "model.layers.0.self_attn.q_proj"


def test_an_adapter_of_another_base_is_refused_site_by_site(tmp_path: Path) -> None:
    base = saved("llama", tmp_path)
    saved_by_peft("llama", tmp_path / "wide", sizes={"hidden_size": 64}, **{**GRALORA, "target_modules": ["q_proj"]})
    with pytest.raises(CheckpointError) as error:
        merge_checkpoint(base, tmp_path / "wide", tmp_path / "merged")
    for layer in (0, 1):
        assert f"model.layers.{layer}.self_attn.q_proj.weight has shape [32, 32] instead of [32, 64]" in str(
            error.value
        )
    saved_by_peft(
        "llama", tmp_path / "deep", sizes={"num_hidden_layers": 3}, **{**GRALORA, "target_modules": ["q_proj"]}
    )
    with pytest.raises(CheckpointError, match=r"missing model.layers.2.self_attn.q_proj.weight"):
        merge_checkpoint(base, tmp_path / "deep", tmp_path / "merged")
    saved_by_peft("bert", tmp_path / "other", **{**GRALORA, "target_modules": ["query"]})
    with pytest.raises(CheckpointError, match=r"missing bert.encoder.layer.0.attention.self.query.weight"):
        merge_checkpoint(base, tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def edit(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(file)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{SITE}.weight": None}, f"missing {SITE}.weight"),
        ({f"{SITE}.weight": torch.zeros(32, 32, dtype=torch.int8)}, f"{SITE}.weight is I8, .* quantized"),
    ],
)
def test_weights_that_cannot_be_merged_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = saved("llama", tmp_path, shards=None)
    directory = _plain(tmp_path)
    edit(base / "model.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoint(base, directory, tmp_path / "merged")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_magnitude_vector": torch.ones(2)}, f"unexpected .*{SITE}.lora_magnitude_vector"),
        ({"gralora_A": torch.full((2, 16, 4), torch.inf)}, "not finite"),
    ],
)
def test_tensors_of_the_adapter_that_do_not_fit_are_named(
    values: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    base, directory = saved("llama", tmp_path), _plain(tmp_path)
    edit(directory / WEIGHTS, **{f"base_model.model.{SITE}.{key}": value for key, value in values.items()})
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoint(base, directory, tmp_path / "merged")


def _cut(base: Path) -> None:
    file = sorted(base.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def _leave(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][f"{SITE}.weight"] = "../other.safetensors"
    (base / INDEX).write_text(json.dumps(index))


def _lose(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[0].unlink()


def _no_config(base: Path) -> None:
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cannot be read"),
        (_leave, "outside its directory"),
        (_lose, "lacks model-00001"),
        (_no_config, "no config"),
    ],
)
def test_a_damaged_base_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    base, directory = saved("llama", tmp_path), _plain(tmp_path)
    damage(base)
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoint(base, directory, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("base", "directory"), [("nowhere", "adapter"), ("base", "nowhere")])
def test_directories_that_do_not_exist_are_refused(base: str, directory: str, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    _plain(tmp_path)
    with pytest.raises(GraloraError, match=r"no .*directory"):
        merge_checkpoint(tmp_path / base, tmp_path / directory, tmp_path / "merged")


def test_another_form_of_lora_is_refused_by_name(tmp_path: Path) -> None:
    base = saved("llama", tmp_path)
    saved_by_peft("llama", tmp_path / "adapter", **LORA, lora_bias=True)
    with pytest.raises(ConfigError, match="a bias of lora_B"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def test_only_an_earlier_model_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    base, directory, output = saved("llama", tmp_path), _plain(tmp_path), tmp_path / "merged"
    merge_checkpoint(base, directory, output)
    with pytest.raises(ExportError, match="overwrite=True"):
        merge_checkpoint(base, directory, output)
    (output / "old.txt").write_text("")
    merge_checkpoint(base, directory, output, overwrite=True)
    assert not (output / "old.txt").exists()
    for place in (base, base / "merged", directory, tmp_path):
        with pytest.raises(ExportError, match="the input"):
            merge_checkpoint(base, directory, place, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ExportError, match="not an earlier result"):
        merge_checkpoint(base, directory, tmp_path / "mine", overwrite=True)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, directory = saved("llama", tmp_path), _plain(tmp_path)

    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(ExportError, match="No space left"):
        merge_checkpoint(base, directory, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
