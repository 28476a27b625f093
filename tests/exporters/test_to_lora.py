"""`to_lora`: PEFT's LoRA computes what PEFT's GraLoRA computed; truncation loses what it says; clear refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import adapted_paths, saved_by_peft
from safetensors.torch import load_file, save_file
from tiny_models import text_batch, tiny_model
from traces import fresh_trace
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.core.methods import read_config
from gralora_fx.core.methods.forms import truncate, update_norm
from gralora_fx.errors import CheckpointError, ConfigError, ExportError, GraloraError
from gralora_fx.exporters import to_lora

WEIGHTS = "adapter_model.safetensors"
SIZES: dict[str, Any] = {"r": 4, "gralora_k": 2, "alpha": 6, "target_modules": "all-linear"}


def loaded_by_peft(name: str, directory: Path, model: PreTrainedModel | None = None) -> peft.PeftModel:
    """Return a tiny base with an adapter that PEFT loads; what PEFT warns of fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        return peft.PeftModel.from_pretrained(model or tiny_model(name), str(directory)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**text_batch()).logits.float()
    return result


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize(
    ("name", "fields", "rank"),
    [
        ("bert", {"gralora_k": 1}, 4),
        ("bert", {"hybrid_r": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}, 12),
        ("bert", {"bias": "all", "target_modules": ["key"], "task_type": "SEQ_CLS"}, 8),
        ("llama", {"gralora_k": 4, "alpha": 5}, 16),
        ("llama", {"hybrid_r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}, 12),
        ("llama", {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 8),
        ("llama", {"target_modules": r".*layers\.1\.self_attn\.[qk]_proj", "task_type": "CAUSAL_LM"}, 8),
        ("llama", {"target_modules": None}, 8),
        ("llama", {"target_modules": ["lm_head", "o_proj"], "gralora_k": 1}, 4),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "hybrid_r": 4}, 12),
        ("gpt2", {"target_modules": ["c_fc"], "bias": "gralora_only", "gralora_k": 4}, 16),
    ],
)
def test_pefts_lora_computes_the_same(name: str, fields: dict[str, Any], rank: int, tmp_path: Path) -> None:
    adapted = saved_by_peft(name, tmp_path / "gralora", **{**SIZES, **fields})
    report = to_lora(tmp_path / "gralora", tmp_path / "lora")
    assert set(report.ranks.values()) == {rank}
    assert report.error == 0
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (rank, rank, "LORA")
    again = loaded_by_peft(name, tmp_path / "lora")
    assert adapted_paths(again) == adapted_paths(adapted) == set(report.ranks)
    assert close(logits(again), logits(adapted))
    assert not close(logits(again), logits(tiny_model(name)), 1e-3)


def test_metadata_of_the_configuration_is_carried_over(tmp_path: Path) -> None:
    fields = {"task_type": "CAUSAL_LM", "revision": "abc", "gralora_dropout": 0.1}
    saved_by_peft("llama", tmp_path / "gralora", **SIZES, **fields)
    file = tmp_path / "gralora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "owner/base"}))
    to_lora(tmp_path / "gralora", tmp_path / "lora")
    config = read_config(tmp_path / "lora")
    assert isinstance(config, LoraConfig)
    assert (config.task_type, config.revision, config.base_model_name_or_path) == ("CAUSAL_LM", "abc", "owner/base")
    assert config.lora_dropout == 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "written"), [(8, None), (6, torch.float32)])
def test_half_precision_is_kept_where_the_scale_folds_exactly(
    dtype: torch.dtype, alpha: int, written: torch.dtype | None, tmp_path: Path
) -> None:
    saved_by_peft("llama", tmp_path / "gralora", **{**SIZES, "r": 4, "alpha": alpha, "hybrid_r": 0})
    file = tmp_path / "gralora" / WEIGHTS
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    report = to_lora(tmp_path / "gralora", tmp_path / "lora")
    assert report.dtype == (written or dtype)
    assert {value.dtype for value in load_file(tmp_path / "lora" / WEIGHTS).values()} == {report.dtype}
    one, other = (loaded_by_peft("llama", tmp_path / form) for form in ("lora", "gralora"))
    assert close(logits(one), logits(other))


@pytest.mark.filterwarnings(
    "ignore:.*rank_pattern, alpha_pattern, gralora_k_pattern, which PEFT's GraLoRA does not read"
)
def test_sites_of_several_sizes(tmp_path: Path) -> None:
    """Ranks and scales of patterns, which PEFT's GraLoRA lacks and its LoRA has."""
    config = GraloraConfig(
        r=4,
        alpha=6,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["model.layers.1.self_attn.v_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 8},
        gralora_k_pattern={"v_proj": 4},
        alpha_pattern={"v_proj": 3},
        init_weights=False,
    )
    model = tiny_model("llama")
    gralora = rewrite(trace(model), config)
    gralora.save_pretrained(tmp_path / "gralora")
    report = to_lora(tmp_path / "gralora", tmp_path / "lora")
    assert sorted(set(report.ranks.values())) == [8, 16]
    assert close(logits(loaded_by_peft("llama", tmp_path / "lora")), logits(gralora))


@pytest.mark.quick
def test_we_load_what_is_written(tmp_path: Path) -> None:
    adapted = saved_by_peft("bert", tmp_path / "gralora", **SIZES, modules_to_save=["classifier"])
    to_lora(tmp_path / "gralora", tmp_path / "lora")
    again = GraloraModel.from_pretrained(fresh_trace("bert"), tmp_path / "lora")
    assert close(logits(again), logits(adapted))


@pytest.mark.parametrize("method", ["GRALORA", "LORA"])
def test_truncation_loses_what_it_says(method: str, tmp_path: Path) -> None:
    fields = SIZES if method == "GRALORA" else {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["c_fc"]}
    saved_by_peft("gpt2", tmp_path / "exact", method=method, **fields)
    before = loaded_by_peft("gpt2", tmp_path / "exact")
    report = to_lora(tmp_path / "exact", tmp_path / "cut", rank=3)
    after = loaded_by_peft("gpt2", tmp_path / "cut")
    lost, norm = [], []
    for path, error in report.errors.items():
        exact, cut = (m.get_submodule(f"base_model.model.{path}").get_delta_weight("default") for m in (before, after))
        exact, cut = exact.double(), cut.double()
        singular = torch.linalg.svdvals(exact)
        assert abs(error - singular[3:].norm() / singular.norm()) < 1e-5
        assert abs(error - (exact - cut).norm() / exact.norm()) < 1e-5
        lost.append((exact - cut).norm())
        norm.append(exact.norm())
    assert abs(report.error - torch.stack(lost).norm() / torch.stack(norm).norm()) < 1e-5
    assert 0 < report.error < 1
    assert f"{report.error:.2e}" in report.details


def test_truncation_to_the_exact_rank_loses_nothing(tmp_path: Path) -> None:
    adapted = saved_by_peft("llama", tmp_path / "exact", method="LORA", r=4, lora_alpha=6, target_modules=["q_proj"])
    assert to_lora(tmp_path / "exact", tmp_path / "same", rank=4).error == 0
    assert close(logits(loaded_by_peft("llama", tmp_path / "same")), logits(adapted))


def test_truncate_of_a_zero_update_and_of_more_rank_than_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(12, 5, generator=generator), torch.randn(7, 12, generator=generator)
    cut = truncate(A, B, -0.3, 9)
    assert cut.A.shape == (5, 5)
    assert torch.allclose(torch.from_numpy(cut.B @ cut.A), -0.3 * B @ A, atol=1e-5)
    assert abs(cut.norm - update_norm(A, B, -0.3)) < 1e-9
    zero = truncate(A, torch.zeros_like(B), 1.0, 2)
    assert (zero.lost, zero.norm, bool(zero.B.any())) == (0, 0, False)


@pytest.fixture
def gralora(tmp_path: Path) -> Path:
    saved_by_peft("llama", tmp_path / "gralora", **{**SIZES, "target_modules": ["q_proj", "v_proj"]})
    return tmp_path / "gralora"


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the first query projection, or remove them."""
    file = directory / WEIGHTS
    tensors = load_file(file)
    for name, value in changes.items():
        key = f"base_model.model.model.layers.0.self_attn.q_proj.{name}"
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, file)


SITE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ({"gralora_B": None}, CheckpointError, f"missing base_model.model.{SITE}.gralora_B"),
        ({"gralora_A": torch.zeros(2, 16, 8)}, CheckpointError, f"{SITE} has .*gralora_A"),
        ({"gralora_A": torch.full((2, 16, 4), torch.nan)}, CheckpointError, f"{SITE}.gralora_A holds .* not finite"),
        ({"gralora_A": torch.zeros(2, 16, 4, dtype=torch.int32)}, CheckpointError, f"{SITE}.gralora_A is I32"),
        ({"gralora_C": torch.zeros(2)}, CheckpointError, f"unexpected .*{SITE}.gralora_C"),
        ({"lora_A.weight": torch.zeros(2, 4)}, CheckpointError, f"unexpected .*{SITE}.lora_A.weight"),
        ({"gralora_A_general.weight": torch.zeros(2, 32)}, CheckpointError, "unexpected .*gralora_A_general.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    damage: dict[str, Any], error: type[GraloraError], message: str, gralora: Path, tmp_path: Path
) -> None:
    edit_tensors(gralora, **damage)
    with pytest.raises(error, match=message):
        to_lora(gralora, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_damaged_files_are_refused(gralora: Path, tmp_path: Path) -> None:
    content = (gralora / WEIGHTS).read_bytes()
    (gralora / WEIGHTS).write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        to_lora(gralora, tmp_path / "lora")
    (gralora / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS}"):
        to_lora(gralora, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="no directory"):
        to_lora(tmp_path / "nowhere", tmp_path / "lora")


@pytest.mark.parametrize("rank", [0, -1, True, 2.0])
def test_a_rank_that_is_none_is_refused(rank: Any, gralora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank must be a positive integer"):
        to_lora(gralora, tmp_path / "lora", rank=rank)


def test_a_rank_above_the_exact_one_is_refused(gralora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank=9 is more than .* at most 8"):
        to_lora(gralora, tmp_path / "lora", rank=9)


def test_a_lora_adapter_is_named_as_such(tmp_path: Path) -> None:
    saved_by_peft("llama", tmp_path / "adapter", method="LORA", r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="is a LoRA adapter already"):
        to_lora(tmp_path / "adapter", tmp_path / "lora")


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    saved_by_peft("llama", tmp_path / "adapter", method="LORA", r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ConfigError, match="DoRA"):
        to_lora(tmp_path / "adapter", tmp_path / "lora", rank=2)


def test_only_an_earlier_adapter_is_replaced_and_only_when_asked(gralora: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an earlier result"):
        to_lora(gralora, output, overwrite=True)
    (output / "notes.txt").unlink()
    to_lora(gralora, output)
    with pytest.raises(ExportError, match="overwrite=True"):
        to_lora(gralora, output, rank=2)
    assert set(to_lora(gralora, output, rank=2, overwrite=True).ranks.values()) == {2}
    for same in (gralora, gralora / "inner", tmp_path):
        with pytest.raises(ExportError, match="the input"):
            to_lora(gralora, same, overwrite=True)
