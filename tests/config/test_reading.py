"""Files of other hands: each ends in PEFT's meaning, a warning that names what is ignored, or one clear error."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import peft_model, saved_by_peft
from tiny_models import tiny_model
from torch import nn
from traces import inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.core.adapters.stored_adapter import open_adapter
from gralora_fx.core.methods import METHODS, AdapterMethod, read_config
from gralora_fx.errors import ConfigError, TargetError
from gralora_fx.exporters import to_lora

NAME = "adapter_config.json"
TINY = trace(nn.Sequential(nn.Linear(8, 8)), (torch.randn(2, 8),))


def write(directory: Path, **fields: Any) -> Path:
    (directory / NAME).write_text(json.dumps({"peft_type": "GRALORA", **fields}))
    return directory


# -- keys that are not known --------------------------------------------------------------------------------------


def test_every_unknown_key_is_refused_with_its_value_and_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, r=8, rank_patern={"q": 4}, use_dora=True, lora_alpha=16, module_to_save=["score"])
    with pytest.raises(ConfigError, match="are not supported in a GraLoRA configuration") as caught:
        GraloraConfig.from_pretrained(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "rank_patern={'q': 4} (is rank_pattern meant?)" in text
    assert "module_to_save=['score'] (is modules_to_save meant?)" in text
    assert "lora_alpha=16 (is alpha meant?)" in text
    assert "use_dora=True (DoRA, which LoraConfig has)" in text


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.config.TITLE)
@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
def test_an_unknown_key_that_says_nothing_is_read(method: AdapterMethod, value: Any, tmp_path: Path) -> None:
    config = method.config(target_modules=["q"])
    (tmp_path / NAME).write_text(json.dumps({**json.loads(config.to_json()), "a_later_form": value}))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.config.TITLE)
@pytest.mark.parametrize(
    ("field", "value"),
    [("trainable_token_indices", [1, 2]), ("layer_replication", [[0, 1]]), ("a_later_form", {"size": 4})],
)
def test_a_key_that_may_change_what_is_computed_is_refused_by_every_way_of_reading(
    method: AdapterMethod, field: str, value: Any, tmp_path: Path
) -> None:
    model = rewrite(TINY, method.config(r=4, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    fields = {**json.loads((tmp_path / NAME).read_text()), field: value}
    (tmp_path / NAME).write_text(json.dumps(fields))
    message = rf"{NAME}: {field}=.* is not supported in a {method.config.TITLE} configuration"
    for read in (
        lambda: read_config(tmp_path),
        lambda: GraloraModel.from_pretrained(TINY, tmp_path),
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: open_adapter(tmp_path).__enter__(),  # as fold, merge, export-adapter and the service do
        lambda: to_lora(tmp_path, tmp_path / "lora"),
    ):
        with pytest.raises(ConfigError, match=message):
            read()
    assert list(model.configs) == ["default"]


def test_what_peft_writes_for_itself_is_silent(tmp_path: Path) -> None:
    saved_by_peft("bert", tmp_path, r=8, target_modules=["query"], task_type="SEQ_CLS")
    fields = json.loads((tmp_path / NAME).read_text())
    assert {"peft_version", "auto_mapping", "peft_type"} <= set(fields)
    live = peft_model(tiny_model("bert"), r=8, target_modules=["query"]).peft_config["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraloraConfig.from_pretrained(tmp_path)
        GraloraConfig.from_peft(live)


def test_an_unknown_field_of_a_live_object_is_named() -> None:
    peers = peft.GraloraConfig(r=8, target_modules=["q"])
    peers.use_dora = True
    with pytest.raises(ConfigError, match=r"the given GraloraConfig: use_dora=True \(DoRA, .*\) is not supported"):
        GraloraConfig.from_peft(peers)


def test_both_alphas_are_not_the_papers_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gralora_alpha=3 .*is not supported"):
        GraloraConfig.from_pretrained(write(tmp_path, alpha=16, gralora_alpha=3))


# -- what PEFT takes and construction refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gralora_dropout", 1.0, "gralora_dropout=1 drops every input of the adapter in training"),
    ],
)
def test_a_checkpoint_of_pefts_keeps_its_meaning(field: str, value: float, message: str, tmp_path: Path) -> None:
    theirs = saved_by_peft("bert", tmp_path, r=8, target_modules=["query"], **{field: value})
    with pytest.warns(UserWarning, match=message):
        model = GraloraModel.from_pretrained(traced("bert"), tmp_path)
    inputs = inputs_of("bert")
    assert getattr(model.configs["default"], field) == value
    assert relative_error(run(model, inputs), run(theirs, inputs)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / NAME).read_text())[field] == value


@pytest.mark.parametrize("alpha", [0, -8])
@pytest.mark.parametrize("method", ["GRALORA", "LORA", "DORA"])
def test_a_scale_of_zero_or_less_is_pefts(method: str, alpha: float, tmp_path: Path) -> None:
    field = "alpha" if method == "GRALORA" else "lora_alpha"
    theirs = saved_by_peft("bert", tmp_path, method=method, r=8, target_modules=["query"], **{field: alpha})
    model = GraloraModel.from_pretrained(traced("bert"), tmp_path)
    inputs = inputs_of("bert")
    assert relative_error(run(model, inputs), run(theirs, inputs)) < 1e-5
    assert relative_error(run(merge(model), inputs), run(theirs, inputs)) < 1e-5
    assert type(model.configs["default"])(**{field: alpha}) is not None  # construction takes it too


@pytest.mark.parametrize("targets", [[], ""], ids=str)
def test_empty_targets_are_read_and_fit_nothing(targets: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="target_modules is empty, so that the configuration fits no model"):
        config = GraloraConfig.from_pretrained(write(tmp_path, target_modules=targets))
    with pytest.raises(TargetError, match="target_modules"):
        rewrite(traced("bert"), config)


# -- files that are not what they should be -----------------------------------------------------------------------

TEXTS = {
    "digits": ('{"peft_type": "GRALORA", "r": ' + "9" * 5000 + "}", "4300 digits"),
    "deep": ("[" * 100_000, "recursion"),
    "deep value": ('{"peft_type": "GRALORA", "r": ' + "[" * 50_000 + "]" * 50_000 + "}", "recursion"),
    "list": ("[]", "holds a list, not an object"),
    "null": ("null", "holds a NoneType, not an object"),
    "string": ('"GRALORA"', "holds a str, not an object"),
    "number": ("3", "holds an int, not an object"),
    "empty": ("", "is not valid JSON"),
    "twice": ('{"peft_type": "GRALORA", "r": 8, "r": 16}', "the key 'r' is in it twice"),
    "twice within": ('{"peft_type": "GRALORA", "rank_pattern": {"q": 4, "q": 8}}', "the key 'q' is in it twice"),
    "not UTF-8": (b'{"peft_type": "GRALORA", "base_model_name_or_path": "\xe9"}', "is not valid JSON"),
    "UTF-16": ('{"peft_type": "GRALORA"}'.encode("utf-16"), "is not valid JSON"),
    "BOM": (b'\xef\xbb\xbf{"peft_type": "GRALORA"}', "BOM"),
    "NaN": ('{"peft_type": "GRALORA", "alpha": NaN}', "alpha must be a finite number, but got nan"),
    "type": ('{"peft_type": ["GRALORA"]}', r"peft_type is \['GRALORA'\], not 'GRALORA'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_of_another_shape_is_one_clear_error(name: str, tmp_path: Path) -> None:
    text, message = TEXTS[name]
    (tmp_path / NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        GraloraConfig.from_pretrained(tmp_path)
    assert str(tmp_path / NAME) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


FIELDS = [name for name in json.loads(GraloraConfig().to_json()) if name != "peft_type"]
FIELDS += ["exclude_modules", "rank_pattern", "alpha_pattern", "gralora_k_pattern", "gralora_alpha"]
VALUES: list[Any] = [True, 2**70, 8.0, 1e308, "(", "((((", [[]], [{}], {"a": []}, {"(": 1}, [None], -1, "x" * 9000]


@pytest.mark.filterwarnings("ignore:.*is in the format of the paper")
@pytest.mark.filterwarnings("ignore:.*(is ignored|is read as 0|subtracts)")
@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_a_field_is_read_or_refused_with_the_file(field: str, tmp_path: Path) -> None:
    refused = []
    for value in VALUES:
        write(tmp_path, **{field: value})
        try:
            GraloraConfig.from_pretrained(tmp_path)
        except ConfigError as error:
            refused.append(str(error))
    assert refused or field == "layers_pattern"  # which is ignored by itself
    assert all(str(tmp_path) in text and len(text) < 600 and "\n" not in text for text in refused)


# -- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["\0", "a\0b", "a" * 5000, "x/" * 3000, "", "\ud800", "a\nb", None, 5, b"abc", 1.5],
    ids=lambda p: repr(p)[:12],
)
def test_what_is_not_a_path_is_one_clear_error(path: Any) -> None:
    with pytest.raises(ConfigError, match="is not a usable path") as caught:
        GraloraConfig.from_pretrained(path)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_links_in_a_circle_and_folders_in_place_of_files(tmp_path: Path) -> None:
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"loop is not a usable path \(Too many levels of symbolic links\)"):
        GraloraConfig.from_pretrained(tmp_path / "loop")
    os.symlink(NAME, tmp_path / NAME)
    with pytest.raises(ConfigError, match=f"no {NAME} in"):
        GraloraConfig.from_pretrained(tmp_path)
    (tmp_path / "other" / NAME).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"no {NAME} in"):
        GraloraConfig.from_pretrained(tmp_path / "other")


# -- live objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (None, "None is not a PEFT configuration"),
        (3, "3 is not a PEFT configuration"),
        ({"peft_type": "GRALORA"}, "is not a PEFT configuration; give a peft.GraloraConfig"),
        (peft.GraloraConfig, r"GraloraConfig is a class; give an object, such as GraloraConfig\(\)"),
        (peft.LoraConfig(), "the given LoraConfig: peft_type is 'LORA', not 'GRALORA'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_a_live_configuration(candidate: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GraloraConfig.from_peft(candidate)


def test_a_live_object_with_a_bad_field_is_named() -> None:
    peers = peft.GraloraConfig()
    peers.r = "8"
    with pytest.raises(ConfigError, match="the given GraloraConfig: r must be a positive integer, but got '8'"):
        GraloraConfig.from_peft(peers)
