"""The base of an adapter and the model that it is used with: what is compared, and what follows from it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from gralora_fx.base.sources.same_base import DIFFERENT, SAME, UNKNOWN, BaseSource, compare_bases
from gralora_fx.errors import CheckpointError

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases that share a last name: two architectures of one shape, another seed, another size, another dtype."""
    root = tmp_path_factory.mktemp("bases")
    models = {
        "qwen3": tiny_model("qwen3"),
        "gemma3": tiny_model("gemma3"),
        "tuned": tiny_model("qwen3", 1),
        "deep": tiny_model("qwen3", num_hidden_layers=3),
        "half": tiny_model("qwen3").to(torch.bfloat16),
    }
    for name, model in models.items():
        model.save_pretrained(root / name / "base")
    return root


def hub(root: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Path:
    """Return a cache of the hub with a repository of two commits; its `main` is the first."""
    repository = root / "models--org--model"
    for commit in COMMITS:
        shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    (repository / "refs" / "v2").write_text(COMMITS[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return repository / "snapshots"


def outcome(made_for: Any, used: Any, revision: str | None = None, used_revision: str | None = None) -> tuple[Any, ...]:
    found = compare_bases(
        BaseSource(None if made_for is None else str(made_for), revision), BaseSource(str(used), used_revision)
    )
    return found.outcome, found.compared


def test_names_that_end_alike_are_told_apart_by_architecture_sizes_and_weights(bases: Path) -> None:
    own = bases / "qwen3" / "base"
    assert outcome(own, bases / "gemma3" / "base") == (DIFFERENT, ("name", "config.json"))
    assert outcome(own, bases / "deep" / "base") == (DIFFERENT, ("name", "config.json"))
    assert outcome(own, bases / "tuned" / "base") == (DIFFERENT, ("name", "config.json", "weights"))
    reasons = [
        compare_bases(BaseSource(str(own)), BaseSource(str(bases / other / "base"))).reason
        for other in ("gemma3", "deep", "tuned")
    ]
    assert reasons[0].startswith("model_type qwen3 and gemma3_text")
    assert reasons[1] == "num_hidden_layers 2 and 3"
    assert "weights have other values" in reasons[2]


@pytest.mark.parametrize("field", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_numbers_of_experts_tell_bases_apart(field: str) -> None:
    """As the families of transformers call them: Qwen, Mixtral, DeepSeek and ERNIE."""
    own, other = (BaseSource(name, None, {"hidden_size": 8, field: count}) for name, count in (("a", 4), ("b", 8)))
    assert (compare_bases(own, other).outcome, compare_bases(own, other).reason) == (DIFFERENT, f"{field} 4 and 8")


def test_one_directory_by_other_words_is_the_same(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = bases / "qwen3" / "base"
    (tmp_path / "link").symlink_to(own)
    monkeypatch.chdir(bases)
    for name in (own, f"{own}/", own / ".." / "base", tmp_path / "link", "qwen3/base", "./qwen3/base/"):
        assert outcome(name, own) == (SAME, ("name",))


def test_what_has_the_name_now_may_be_another_model(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an export that was made of `base` in another directory."""
    fields = json.loads((bases / "gemma3" / "base" / "config.json").read_text())
    monkeypatch.chdir(bases / "qwen3")
    found = compare_bases(BaseSource("base"), BaseSource("base", None, fields))
    assert (found.outcome, found.compared) == (DIFFERENT, ("name", "config.json"))
    own = json.loads((bases / "qwen3" / "base" / "config.json").read_text())
    assert compare_bases(BaseSource("base"), BaseSource("base", None, own)).outcome == SAME


def test_a_copy_is_known_by_its_weights_in_another_dtype_too(bases: Path, tmp_path: Path) -> None:
    own = bases / "qwen3" / "base"
    shutil.copytree(own, tmp_path / "copy")
    everything = ("name", "config.json", "weights")
    assert outcome(own, tmp_path / "copy") == (SAME, everything)
    assert outcome(own, bases / "half" / "base") == (SAME, everything)


def test_a_moved_base_is_not_known_to_be_the_same(bases: Path, tmp_path: Path) -> None:
    for gone in (tmp_path / "before" / "base", "elsewhere/base", "org/base"):
        found = compare_bases(BaseSource(str(gone)), BaseSource(str(bases / "qwen3" / "base")))
        assert (found.outcome, found.compared) == (UNKNOWN, ("name",))
        assert found.reason == f"no config.json of {gone} is available, so only the names can be compared"
        with pytest.warns(
            UserWarning, match=f"one was made for {gone}, and is used with .*, which may be another base"
        ):
            found.settle("one", strict=False, error=CheckpointError)
        with pytest.raises(CheckpointError, match=r"leave strict_base=True out"):
            found.settle("one", strict=True, error=CheckpointError)


def test_weights_that_are_not_at_hand_leave_it_open(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    shutil.copyfile(bases / "qwen3" / "base" / "config.json", tmp_path / "base" / "config.json")
    assert outcome(tmp_path / "base", bases / "qwen3" / "base") == (UNKNOWN, ("name", "config.json"))


def _file(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        _file(b"[]"),
        _file(b'{"a": []}'),
        _file(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-1, %d]}}' % 10**30),
        _file(b'{"a": {"dtype": "F32", "shape": [%d], "data_offsets": [0, 4]}}' % 2**62),
        _file(b'{"a": ' + b"[" * 100_000),
    ],
)
def test_a_damaged_weight_file_cannot_be_compared(bases: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(bases / "qwen3" / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    assert outcome(tmp_path / "base", bases / "qwen3" / "base") == (UNKNOWN, ("name", "config.json"))
    assert outcome(bases / "qwen3" / "base", tmp_path / "base") == (UNKNOWN, ("name", "config.json"))


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_that_names_no_base_is_used_without_a_word_but_not_strictly(bases: Path, name: Any) -> None:
    found = compare_bases(BaseSource(name), BaseSource(str(bases / "qwen3" / "base")))
    assert (found.made_for, found.outcome, found.compared) == (None, UNKNOWN, ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.settle("one", strict=False, error=CheckpointError)
    with pytest.raises(CheckpointError, match="names no base model, so there is nothing to compare"):
        found.settle("one", strict=True, error=CheckpointError)


def test_a_model_made_in_memory_is_compared_by_its_configuration(bases: Path) -> None:
    fields = tiny_model("gemma3").config.to_dict()
    found = compare_bases(BaseSource(str(bases / "qwen3" / "base")), BaseSource(None, None, fields))
    assert (found.outcome, found.compared) == (DIFFERENT, ("config.json",))
    with pytest.warns(UserWarning, match="is used with a model without a name, another base: model_type"):
        found.settle("one", strict=False, error=CheckpointError)
    own = BaseSource(None, None, tiny_model("qwen3").config.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_bases(BaseSource(str(bases / "qwen3" / "base")), own).settle("one", strict=False, error=CheckpointError)


def test_a_part_of_a_composite_model_is_that_model(bases: Path, tmp_path: Path) -> None:
    """As Gemma 3's directories hold a model of images and texts, of which the text model is loaded."""
    text = json.loads((bases / "gemma3" / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    used = BaseSource(None, None, text)
    assert compare_bases(BaseSource(str(tmp_path)), used).outcome == UNKNOWN
    assert (
        compare_bases(BaseSource(str(tmp_path)), BaseSource(None, None, {**text, "hidden_size": 8})).outcome
        == DIFFERENT
    )


VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27}


def composite(width: int, depth: int, **fields: Any) -> dict[str, Any]:
    """Gemma 3's configurations of 4 and 12 billion parameters have the same vision tower."""
    text = {"model_type": "gemma3_text", "hidden_size": width, "num_hidden_layers": depth}
    return {"model_type": "gemma3", "text_config": {**text, **fields}, "vision_config": VISION}


def of_fields(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    found = compare_bases(BaseSource("org/one", None, one), BaseSource("org/other", None, other))
    return found.outcome, found.reason


def test_composite_models_are_told_apart_by_what_they_are_composed_of() -> None:
    small, large = composite(2560, 34), composite(3840, 48)
    reason = "text_config.num_hidden_layers 34 and 48"
    assert of_fields(small, large) == (DIFFERENT, f"text_config.hidden_size 2560 and 3840, {reason}")
    within = {"model_type": "omni", "thinker_config": small}, {"model_type": "omni", "thinker_config": large}
    assert of_fields(*within)[0] == DIFFERENT
    other_family = {**small, "model_type": "paligemma", "text_config": {"model_type": "gemma2", "hidden_size": 8}}
    assert of_fields(small, other_family)[0] == DIFFERENT  # though both have the same vision tower


@pytest.mark.parametrize("depth", [34, 48])
def test_a_composite_model_is_compared_with_the_text_model_in_it(depth: int) -> None:
    whole, text = composite(2560, 34), composite(2560, depth)["text_config"]
    same = "both have the same model_type and sizes, but the weights cannot be compared"
    for pair in ((whole, text), ({"model_type": "omni", "thinker_config": whole}, text)):
        assert of_fields(*pair) == ((UNKNOWN, same) if depth == 34 else (DIFFERENT, "num_hidden_layers 34 and 48"))


def test_a_part_by_the_name_of_a_later_version_is_no_difference() -> None:
    assert of_fields(composite(8, 2), composite(8, 2, model_type="gemma3_text_model"))[0] == UNKNOWN
    assert of_fields(composite(8, 2), composite(8, 2, model_type="llama"))[0] == DIFFERENT


def test_configurations_without_a_common_field_tell_nothing() -> None:
    outcome, reason = of_fields({"model_type": "gpt2"}, {"hidden_size": 8})
    assert outcome == UNKNOWN
    assert reason.startswith("their configurations have no common field that would tell them apart")


def test_names_and_commits_alone_prove_nothing(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(tmp_path, monkeypatch, bases / "qwen3" / "base")
    pairs = {
        ("org/model", "org/gone"): UNKNOWN,  # as `gpt2` and `openai-community/gpt2`
        ("org/model", "org/model"): DIFFERENT,  # another commit
    }
    for (made, used), expected in pairs.items():
        found = compare_bases(BaseSource(made, COMMITS[0]), BaseSource(used, COMMITS[1]))
        assert (found.outcome, found.is_proven_different) == (expected, False)
    found = compare_bases(BaseSource("org/model"), BaseSource(str(bases / "tuned" / "base")))
    assert found.is_proven_different


def test_hub_ids_and_snapshots(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = hub(tmp_path, monkeypatch, bases / "qwen3" / "base")
    assert outcome("org/model", "Org/Model") == (SAME, ("name",))
    assert outcome("org/model", snapshots / COMMITS[0]) == (SAME, ("name",))
    assert outcome(snapshots / COMMITS[1], "org/model") == (SAME, ("name",))
    assert outcome("org/other", "org/model") == (UNKNOWN, ("name",))
    assert outcome("org/model", bases / "gemma3" / "base") == (DIFFERENT, ("name", "config.json"))
    shutil.copytree(bases / "qwen3" / "base", tmp_path / "model")
    assert outcome("org/model", tmp_path / "model") == (SAME, ("name", "config.json", "weights"))


def test_revisions(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = hub(tmp_path, monkeypatch, bases / "qwen3" / "base")
    both = ("name", "revision")
    assert outcome("org/model", "org/model", COMMITS[0]) == (SAME, both)
    assert outcome("org/model", "org/model", "main") == (SAME, both)
    assert outcome("org/model", "org/model", COMMITS[1]) == (DIFFERENT, both)
    assert outcome("org/model", "org/model", "v2") == (DIFFERENT, both)
    assert outcome("org/model", snapshots / COMMITS[1], "v2") == (SAME, both)
    assert outcome("org/model", "org/model", "v3") == (UNKNOWN, ("name",))
    assert outcome("org/model", "org/model", COMMITS[1], COMMITS[1]) == (SAME, both)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_a_name_that_is_no_path_is_no_error(bases: Path, name: str) -> None:
    assert outcome(name, bases / "qwen3" / "base") == (UNKNOWN, ("name",))
