"""Sentence encoders traced: each module compared with sentence-transformers' own, and what is refused."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sentence_encoders import HIDDEN, save_encoder, save_transformer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as oracle
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.errors import TraceError
from gralora_fx.features.sentences.encoder import followed_by
from gralora_fx.features.sentences.stored_modules import POOLING_MODES, Normalize, Pooling, SentenceModules

TASK = "sentence-similarity"


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return tiny_model("bert").base_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two poolings, a Dense and a Normalize."""
    dense = oracle.Dense(2 * HIDDEN, 24, activation_function=nn.GELU())
    return save_encoder("bert", tmp_path_factory.mktemp("bert"), ("mean", "max"), dense, oracle.Normalize())


def expected(directory: Path, batch: dict[str, Tensor]) -> Tensor:
    """Return the embeddings of sentence-transformers for token ids."""
    with torch.no_grad():
        result: Tensor = SentenceTransformer(str(directory), device="cpu").eval()(dict(batch))["sentence_embedding"]
    return result


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("modes", [*((mode,) for mode in POOLING_MODES), ("cls", "mean", "weightedmean", "lasttoken")])
def test_pooling_is_sentence_transformers(bert: PreTrainedModel, modes: Any, padding: str) -> None:
    batch = text_batch(4, 9, padding)
    with torch.no_grad(), followed_by(bert, SentenceModules("", (Pooling(modes),))):
        actual = bert(**batch)
    with torch.no_grad():
        features = {"token_embeddings": bert(**batch).last_hidden_state, "attention_mask": batch["attention_mask"]}
        pooled = oracle.Pooling(HIDDEN, modes)(features)["sentence_embedding"]
    torch.testing.assert_close(actual.token_embeddings, features["token_embeddings"])
    torch.testing.assert_close(actual.sentence_embedding, pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_long_row_does_not_overflow(dtype: torch.dtype) -> None:
    """Sums are in float32: those of 400 values of 300 are more than float16 holds."""
    states = torch.full((1, 400, 4), 300.0, dtype=dtype)
    model = tiny_model("bert").base_model.to(dtype)
    modules = SentenceModules("", (Pooling(("mean", "weightedmean")), Normalize()))
    with followed_by(model, modules):
        steps = model.get_submodule("sentence_modules")
        _, embedding = steps(states, torch.ones(1, 400, dtype=torch.int64))
    torch.testing.assert_close(embedding, torch.full((1, 8), 8**-0.5, dtype=dtype))


def test_a_float64_model_loses_nothing() -> None:
    model, batch = tiny_model("bert").base_model.double(), text_batch()
    with torch.no_grad(), followed_by(model, SentenceModules("", (Pooling(("mean", "weightedmean")), Normalize()))):
        actual = model(**batch)
    features = {"token_embeddings": actual.token_embeddings, "attention_mask": batch["attention_mask"]}
    pooled = oracle.Normalize()(oracle.Pooling(HIDDEN, ("mean", "weightedmean"))(features))["sentence_embedding"]
    torch.testing.assert_close(actual.sentence_embedding, pooled, rtol=1e-12, atol=1e-12)


def test_a_trace_is_the_encoder(encoder: Path) -> None:
    model = AutoModel.from_pretrained(encoder).eval()
    names = {name for name, _ in model.named_modules()}
    traced = trace(model, task=TASK)
    assert {name for name, _ in model.named_modules()} == names
    assert type(model.forward).__name__ == "method"  # the model is as it was
    for padding in ("right", "left"):
        batch = text_batch(5, 11, padding)
        for copied in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
            actual = copied(**batch).sentence_embedding
            torch.testing.assert_close(actual, expected(encoder, batch), rtol=1e-5, atol=1e-6)
    assert {site.path for site in traced.sites if site.kind == "linear"} == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    assert traced.site("pooler.dense").calls == ()  # nothing reads it


def test_an_adapter_trains_through_the_pooling(encoder: Path) -> None:
    """Gradients are PEFT's, through sentence-transformers; only the adapter has any."""
    config = {"r": 8, "gralora_k": 2, "target_modules": ["query", "value"], "init_weights": False}
    source = SentenceTransformer(str(encoder), device="cpu").eval()
    wrapped = peft.get_peft_model(source[0].model, peft.GraloraConfig(**config)).eval()  # in place
    theirs = {name.replace(".default", ""): value for name, value in wrapped.named_parameters() if value.requires_grad}
    gralora = rewrite(trace(AutoModel.from_pretrained(encoder).eval(), task=TASK), GraloraConfig(**config))
    pairs = []
    for path in (entry.site.path for entry in gralora.plans["default"].selected):
        factors, prefix = gralora.factors(path), f"base_model.model.{path}.gralora"
        pairs += [(factors.A, theirs[f"{prefix}_A"]), (factors.B, theirs[f"{prefix}_B"])]
    assert len(pairs) == len(theirs) == sum(value.requires_grad for value in gralora.parameters())
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)
    batch = text_batch()
    source(dict(batch))["sentence_embedding"][:, 0].sum().backward()
    gralora(**batch).sentence_embedding[:, 0].sum().backward()
    for own, other in pairs:
        assert own.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_an_embedding_is_truncated(encoder: Path, tmp_path: Path) -> None:
    whole = SentenceTransformer(str(encoder), device="cpu", truncate_dim=7)
    whole.save_pretrained(str(tmp_path))
    traced = trace(AutoModel.from_pretrained(tmp_path).eval(), task=TASK)
    batch = text_batch()
    torch.testing.assert_close(
        traced(**batch).sentence_embedding, expected(encoder, batch)[:, :7], rtol=1e-5, atol=1e-6
    )


def test_the_modules_of_another_directory(bert: PreTrainedModel, encoder: Path) -> None:
    traced = trace(AutoModel.from_pretrained(encoder).eval(), task=TASK, sentence_modules=encoder)
    assert traced(**text_batch()).sentence_embedding.shape == (3, 24)
    with pytest.raises(TraceError, match="sentence_modules have no effect for the task None; give task='sentence-sim"):
        trace(bert, sentence_modules=encoder)
    with pytest.raises(TraceError, match=r"holds no modules\.json of a sentence encoder"):
        trace(bert, task=TASK, sentence_modules=encoder.parent)


@pytest.mark.parametrize(
    ("name", "pooled"), [("bert", "the mean of its token emb"), ("qwen3", "the embedding of its la")]
)
def test_without_modules_it_is_as_sentence_transformers_guesses(name: str, pooled: str, tmp_path: Path) -> None:
    directory = save_transformer(name, tmp_path)
    if name == "qwen3":
        tiny_model(name, pad_token_id=0).save_pretrained(directory)  # with its head, so that it is a language model's
    model = AutoModel.from_pretrained(directory).eval()
    with pytest.warns(UserWarning, match=f"{directory} has no modules.json, so its sentence embedding is {pooled}"):
        traced = trace(model, task=TASK)
    batch = text_batch()
    actual = traced(**batch).sentence_embedding
    torch.testing.assert_close(actual, expected(directory, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_model_without_hidden_states_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=r"needs a model that returns hidden states, but got a .*; load it"):
        trace(tiny_model(name), task=TASK)


def test_what_else_cannot_be_a_sentence_encoder() -> None:
    with pytest.raises(TraceError, match="needs a transformers model, but got a Linear"):
        trace(nn.Linear(2, 2), (torch.ones(1, 2),), task=TASK)
    with pytest.raises(TraceError, match="BertForSequenceClassification; load it with AutoModel"):
        trace(tiny_model("bert"), task=TASK)
    with pytest.raises(TraceError, match="'sentence-similarity' takes input_ids, but ViTModel takes pixel_values"):
        trace(tiny_model("vit").base_model, task=TASK)


@pytest.mark.parametrize("damage", ["nothing", "other"])
def test_damaged_weights_are_named(encoder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(encoder, tmp_path / "encoder")
    file = tmp_path / "encoder" / "2_Dense" / "model.safetensors"
    file.write_bytes(b"" if damage == "nothing" else (encoder / "model.safetensors").read_bytes())
    with pytest.raises(TraceError, match=f"{file} (cannot be read|holds embeddings)"):
        trace(AutoModel.from_pretrained(tmp_path / "encoder"), task=TASK)
