"""The base that an adapter was trained on, told from the same base in other bits, with the measured change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from four_bit_bases import float_base, in_eight_bits, in_four_bits

from gralora_fx.base.sources.same_base import DIFFERENT, QUANTIZATION, SAME, BaseSource, compare_bases
from gralora_fx.errors import CheckpointError
from gralora_fx.features.nf4.four_bits import FourBits

pytest.importorskip("bitsandbytes")
NF4 = FourBits()
WIDE = FourBits(block_size=128)


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "GPT2LMHeadModel"])
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a float base, what bitsandbytes saved of it, and another base."""
    folder = tmp_path_factory.mktemp("bases")
    base = float_base(folder / "float", request.param)
    for name, quantization in (("nf4", NF4), ("wide", WIDE)):
        in_four_bits(base, quantization).save_pretrained(folder / name)
    in_eight_bits(base).save_pretrained(folder / "int8")
    other = float_base(folder / "other", request.param)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    save_file({key: tensor.flip(0) for key, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    in_four_bits(other, NF4).save_pretrained(folder / "other-nf4")
    return {name: str(folder / name) for name in ("float", "nf4", "wide", "int8", "other", "other-nf4")}


def recorded(quantization: FourBits) -> Any:
    return json.loads(json.dumps(quantization.to_dict()))


def test_the_same_quantization_is_the_same_base(bases: dict[str, str]) -> None:
    made = BaseSource(bases["float"], record=recorded(NF4))
    for used in (made, BaseSource(bases["nf4"]), BaseSource(bases["float"], record="nf4-bfloat16")):
        assert compare_bases(made, used).outcome == SAME
    for used in (BaseSource(bases["nf4"]), BaseSource(bases["float"], record="nf4")):
        assert compare_bases(BaseSource(bases["float"]), used).outcome == SAME, "nothing is known of the adapter's"


@pytest.mark.parametrize("used", ["float", "wide"])
def test_another_one_is_told_with_its_change(bases: dict[str, str], used: str) -> None:
    for made in (BaseSource(bases["float"], record=recorded(NF4)), BaseSource(bases["nf4"])):
        compared = compare_bases(made, BaseSource(bases[used]))
        assert compared.outcome == DIFFERENT
        assert compared.is_proven_different
        assert QUANTIZATION in compared.compared
        assert compared.change is not None
        assert 0.05 < compared.change < 0.2
        other = "float" if used == "float" else "nf4-128"
        assert f"its base was in nf4-64, and the weights here are {other}: they differ by" in compared.reason
        assert "take base_quantization='nf4-64' with the float base" in compared.reason
        assert compared.to_dict()["change"] == compared.change
        with pytest.warns(UserWarning, match="they differ by"):
            compared.settle("the adapter", strict=False, error=CheckpointError)
        with pytest.raises(CheckpointError, match="leave strict_base=True out"):
            compared.settle("the adapter", strict=True, error=CheckpointError)


def test_another_base_in_four_bits_is_another_base(bases: dict[str, str]) -> None:
    for made in ("float", "nf4"):
        for used in ("other", "other-nf4"):
            compared = compare_bases(BaseSource(bases[made]), BaseSource(bases[used]))
            assert compared.outcome == DIFFERENT
            assert "have other values" in compared.reason


def test_without_files_it_is_told_but_not_measured() -> None:
    fields = {"model_type": "llama", "hidden_size": 8}
    made = BaseSource("owner/name", fields=fields, record="nf4")
    compared = compare_bases(made, BaseSource("owner/name", fields=fields))
    assert (compared.outcome, compared.change) == (DIFFERENT, None)
    assert "the difference is not measured, since no weights of owner/name are at hand" in compared.reason


def test_without_bitsandbytes_it_is_told_but_not_measured(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    compared = compare_bases(BaseSource(bases["float"], record="nf4"), BaseSource(bases["float"]))
    assert (compared.outcome, compared.change) == (DIFFERENT, None)
    assert "pip install 'gralora-fx[nf4]'" in compared.reason


def test_a_folded_adapter_of_four_bits_warns(bases: dict[str, str], tmp_path: Path) -> None:
    """`export_adapter`, `fold_onnx` and `merge_checkpoint` ask the same question of an adapter's record."""
    from gralora_fx import LoraConfig

    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=bases["float"], base_quantization="nf4")
    config.save_pretrained(tmp_path)
    made = LoraConfig.from_pretrained(tmp_path).made_for
    assert compare_bases(made, BaseSource(bases["float"])).outcome == DIFFERENT
    assert "base_quantization" not in json.loads(LoraConfig(target_modules=["q_proj"]).to_json())


def test_eight_bits_are_told_with_their_change(bases: dict[str, str]) -> None:
    made = BaseSource(bases["float"], record="int8")
    assert compare_bases(made, BaseSource(bases["int8"])).outcome == SAME
    compared = compare_bases(made, BaseSource(bases["float"]))
    assert compared.outcome == DIFFERENT
    assert compared.change is not None
    assert 0.001 < compared.change < 0.02
