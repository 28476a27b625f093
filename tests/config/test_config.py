"""`GraloraConfig`: PEFT's fields and files, and one clear error for each bad value."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

from gralora_fx import GraloraConfig, LoraConfig
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import DoraConfig
from gralora_fx.errors import ConfigError, GraloraError

pytestmark = pytest.mark.quick

BEYOND_PEFT = {"exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}, "gralora_k_pattern": {}}
BEYOND_PEFT |= {"base_quantization": None, "target_parameters": None, "alora_invocation_tokens": None}
SHARED = [field.name for field in dataclasses.fields(GraloraConfig) if field.name not in BEYOND_PEFT]


def theirs(**fields: Any) -> peft.GraloraConfig:
    return peft.GraloraConfig(**fields)


def plain(value: Any) -> Any:
    """Return a field's value, without PEFT's enum and its order of sets."""
    value = getattr(value, "value", value)
    return set(value) if isinstance(value, (list, set)) else value


# -- fields -------------------------------------------------------------------------------------------------------


def test_defaults_are_pefts() -> None:
    ours, peers = GraloraConfig(), theirs()
    assert {name: getattr(ours, name) for name in SHARED} == {name: getattr(peers, name) for name in SHARED}
    assert ours.peft_type == peers.peft_type.value == "GRALORA"
    assert {name: getattr(ours, name) for name in BEYOND_PEFT} == BEYOND_PEFT


def test_every_gralora_field_of_peft_is_ours() -> None:
    own = {field.name for field in dataclasses.fields(peft.GraloraConfig)} - {
        field.name for field in dataclasses.fields(peft.PeftConfig)
    }
    assert own <= set(SHARED)


@pytest.mark.parametrize(("r", "hybrid_r", "alpha", "scale"), [(32, 0, 64, 2.0), (8, 8, 8, 0.5), (32, 8, 80, 2.0)])
def test_the_scale_counts_both_ranks(r: int, hybrid_r: int, alpha: float, scale: float) -> None:
    assert GraloraConfig(r=r, hybrid_r=hybrid_r, alpha=alpha).scale == scale


def test_a_list_of_targets_becomes_a_set() -> None:
    assert GraloraConfig(target_modules=["b", "a", "b"]).target_modules == {"a", "b"}
    assert GraloraConfig(target_modules="a.*").target_modules == "a.*"


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GraloraConfig().r = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_the_shorthand_in_any_case(text: str) -> None:
    assert GraloraConfig(target_modules=text).adapts_all_linear


@pytest.mark.parametrize(
    ("task_type", "heads"),
    [
        ("SEQ_CLS", ("classifier", "score")),
        ("TOKEN_CLS", ("classifier", "score")),
        ("QUESTION_ANS", ("qa_outputs",)),
        ("CAUSAL_LM", ()),
        (None, ()),
    ],
)
def test_a_task_type_adds_its_head(task_type: str | None, heads: tuple[str, ...]) -> None:
    config = GraloraConfig(modules_to_save=["norm"], task_type=task_type)
    assert config.saved_module_names == ("norm", *heads)


# -- bad fields ---------------------------------------------------------------------------------------------------

BAD = [
    ({"r": 0}, r"r must be .*0"),
    ({"r": -4}, r"r must be .*-4"),
    ({"r": 2.0}, r"r must be .*2\.0"),
    ({"r": True}, r"r must be .*True"),
    ({"r": "8"}, r"r must be .*'8'"),
    ({"gralora_k": 0}, r"gralora_k must be .*0"),
    ({"gralora_k": 1.5}, r"gralora_k must be .*1\.5"),
    ({"r": 5, "gralora_k": 2}, r"^r should be divisible by gralora_k, but got 5 and 2; take r=4 or another gralora_k$"),
    ({"r": 1, "gralora_k": 4}, r"but got 1 and 4; take r=4"),
    ({"hybrid_r": -1}, r"hybrid_r must be .*-1"),
    ({"hybrid_r": None}, r"hybrid_r must be .*None"),
    ({"alpha": "high"}, r"alpha must be .*'high'"),
    ({"alpha": float("nan")}, r"alpha must be .*nan"),
    ({"alpha": float("inf")}, r"alpha must be .*inf"),
    ({"alpha": None}, r"alpha must be .*None"),
    ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] must be a finite number, but got None"),
    ({"target_modules": []}, "target_modules is empty; name modules, or take 'all-linear'"),
    ({"target_modules": ""}, "target_modules is empty; name modules, or take 'all-linear'"),
    ({"bias": "x" * 10_000}, "bias must be one of none, all, gralora_only, but got 'xxx"),
    ({"gralora_dropout": 1}, r"gralora_dropout must be in \[0, 1\), but got 1; take 0 for none"),
    ({"gralora_dropout": -0.1}, r"gralora_dropout must be in \[0, 1\), but got -0\.1"),
    ({"gralora_dropout": float("nan")}, r"gralora_dropout must be .*nan"),
    ({"bias": "lora_only"}, "bias must be one of none, all, gralora_only, but got 'lora_only'"),
    ({"bias": True}, "bias must be one of none, all, gralora_only, but got True"),
    ({"task_type": "CLASSIFY"}, "task_type must be one of SEQ_CLS.*but got 'CLASSIFY'"),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out must be True or False, but got 1"),
    ({"init_weights": "gaussian"}, "init_weights must be True or False, but got 'gaussian'"),
    ({"inference_mode": None}, "inference_mode must be True or False, but got None"),
    ({"revision": 3}, "revision must be a string or None, but got 3"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string or None, but got 3"),
    ({"target_modules": 3}, "target_modules must be a list of names, a string or None, but got 3"),
    ({"target_modules": ["q", 3]}, "target_modules must hold non-empty strings, but it holds 3"),
    ({"target_modules": [""]}, "target_modules must hold non-empty strings, but it holds ''"),
    ({"target_modules": "(q"}, r"target_modules '\(q' is not a valid regular expression.*give a list"),
    ({"modules_to_save": "head"}, "modules_to_save must be a list of names or None, but got 'head'"),
    ({"modules_to_save": [None]}, "modules_to_save must hold non-empty strings, but it holds None"),
    ({"layers_to_transform": "1"}, "layers_to_transform must be an index, a list of them or None, but got '1'"),
    ({"layers_to_transform": True}, "layers_to_transform must be an index, a list of them or None, but got True"),
    ({"layers_to_transform": [1, -1]}, r"layers_to_transform must be .*-1"),
    ({"layers_to_transform": [1.0]}, r"layers_to_transform must be .*1\.0"),
    ({"layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern must be a name, a list of names or None"),
    ({"layers_pattern": "h"}, "layers_pattern='h' has no effect without layers_to_transform; give the layer indices"),
    (
        {"layers_pattern": "h", "layers_to_transform": []},
        "layers_pattern='h' has no effect without layers_to_transform",
    ),
    (
        {"target_modules": "q.*", "layers_to_transform": [0]},
        r"layers_to_transform=\[0\] does not go with target_modules='q\.\*': a regular",
    ),
    ({"target_modules": "q.*", "layers_to_transform": [0], "layers_pattern": "h"}, "does not go with target_modules"),
    ({"exclude_modules": "(q"}, r"exclude_modules '\(q' is not a valid regular expression.*give a list"),
    ({"exclude_modules": ["q", ""]}, "exclude_modules must hold non-empty strings, but it holds ''"),
    ({"exclude_modules": 3}, "exclude_modules must be a list of names, a string or None, but got 3"),
    ({"rank_pattern": [("q", 4)]}, "rank_pattern must be a dict from module names to values, but got .*'q', 4"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a positive integer, but got 0"),
    ({"rank_pattern": {"": 4}}, "rank_pattern must hold non-empty strings, but it holds ''"),
    ({"rank_pattern": {"(q": 4}}, r"rank_pattern holds '\(q', which is not a valid name"),
    ({"rank_pattern": None}, "rank_pattern must be a dict from module names to values, but got None"),
    ({"alpha_pattern": {"q": "high"}}, r"alpha_pattern\['q'\] must be a finite number, but got 'high'"),
    ({"gralora_k_pattern": {"q": 1.5}}, r"gralora_k_pattern\['q'\] must be a positive integer, but got 1\.5"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_bad_field_is_named_with_its_value_and_a_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GraloraConfig(**fields)
    assert isinstance(caught.value, (GraloraError, ValueError))
    text = str(caught.value)
    assert any(name in text for name in fields)
    assert len(text) < 400


@pytest.mark.parametrize("field", ["r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k", "layers_to_transform"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_of_thousands_of_digits_is_refused(field: str, sign: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be .*but got a value of type int, too large to show"):
        GraloraConfig(**{field: sign * 10**5000})


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1, "gralora_k": 1},
        {"alpha": 1e-30},
        {"gralora_dropout": 0.999},
        {"hybrid_r": 1},
        {"layers_to_transform": 0},
        {"layers_to_transform": [], "target_modules": "q.*"},
        {"target_modules": "all-linear", "layers_to_transform": [1], "layers_pattern": ["h"]},
    ],
    ids=str,
)
def test_values_at_the_border_are_taken(fields: dict[str, Any]) -> None:
    mine, peers = GraloraConfig(**fields), theirs(**fields)
    for name in fields:
        assert getattr(mine, name) == getattr(peers, name)


# -- files --------------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"r": 8, "gralora_k": 4, "hybrid_r": 4, "alpha": 24, "target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.(q|v)_proj", "gralora_dropout": 0.1, "init_weights": False},
    {"target_modules": "all-linear", "bias": "gralora_only", "task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    {"target_modules": ["q"], "layers_to_transform": [0, 3], "layers_pattern": ["h"], "fan_in_fan_out": True},
    {"target_modules": ["q"], "layers_to_transform": 2, "layers_pattern": "h", "revision": "main"},
    {"base_model_name_or_path": "owner/name", "inference_mode": True, "layers_to_transform": []},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_a_file_of_pefts_reads_as_pefts_object(fields: dict[str, Any], tmp_path: Path) -> None:
    peers = theirs(**fields)
    peers.save_pretrained(str(tmp_path))
    # PEFT switches inference_mode on in the file
    read_back = peft.GraloraConfig.from_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GraloraConfig.from_pretrained(tmp_path)
        live = GraloraConfig.from_peft(read_back)
    assert {name: plain(getattr(ours, name)) for name in SHARED} == {
        name: plain(getattr(read_back, name)) for name in SHARED
    }
    assert live == ours


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_our_file_reads_in_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    ours = GraloraConfig(**fields)
    ours.save_pretrained(tmp_path)
    peers = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(peers, peft.GraloraConfig)
    assert {name: plain(getattr(ours, name)) for name in SHARED} == {
        name: plain(getattr(peers, name)) for name in SHARED
    }
    assert GraloraConfig.from_pretrained(tmp_path) == ours


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"exclude_modules": ["b", "a"]}, ["a", "b"]),
        ({"exclude_modules": r".*\.0\..*"}, r".*\.0\..*"),
        ({"rank_pattern": {"fc": 4}}, {"fc": 4}),
        ({"alpha_pattern": {"fc": 4.5}}, {"fc": 4.5}),
        ({"gralora_k_pattern": {"fc": 1}}, {"fc": 1}),
    ],
    ids=str,
)
def test_fields_beyond_pefts_are_in_the_file_only_if_used(fields: dict[str, Any], text: Any, tmp_path: Path) -> None:
    assert not set(json.loads(GraloraConfig().to_json())) & set(BEYOND_PEFT)
    config = GraloraConfig(target_modules=["q"], **fields)
    written = json.loads(config.to_json())
    assert {name: written[name] for name in set(BEYOND_PEFT) & set(written)} == {next(iter(fields)): text}
    config.save_pretrained(tmp_path)
    assert GraloraConfig.from_pretrained(tmp_path) == config
    with pytest.warns(UserWarning, match=next(iter(fields))):  # PEFT says that it ignores the field
        peft.GraloraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("layers", [(0, 1), range(2), {0, 1}], ids=str)
def test_any_collection_of_layer_indices_is_a_list(layers: Any) -> None:
    assert GraloraConfig(target_modules=["q"], layers_to_transform=layers).layers_to_transform == [0, 1]


def test_the_file_is_sorted_for_a_clean_diff(tmp_path: Path) -> None:
    config = GraloraConfig(target_modules={f"layer{index}" for index in range(30)})
    config.save_pretrained(tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "adapter_config.json").read_text()
    fields = json.loads(text)
    assert list(fields) == sorted(fields)
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert fields["peft_type"] == "GRALORA"
    assert text.endswith("}\n")


def write(directory: Path, **fields: Any) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "GRALORA", **fields}))
    return directory


@pytest.mark.parametrize(
    ("fields", "field", "value", "message"),
    [
        (
            {"target_modules": "q.*", "layers_to_transform": [0]},
            "layers_to_transform",
            None,
            r"layers_to_transform=\[0\] is ignored, as PEFT ignores it beside a regular expression",
        ),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            "layers_pattern",
            None,
            "layers_pattern='h' is ignored, as PEFT ignores it without layers_to_transform",
        ),
        ({"gralora_dropout": -0.5}, "gralora_dropout", 0.0, r"gralora_dropout=-0\.5 is read as 0, as PEFT reads it"),
    ],
)
def test_what_peft_ignores_is_a_warning_on_load(
    fields: dict[str, Any], field: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        config = GraloraConfig.from_pretrained(write(tmp_path, **fields))
    assert getattr(config, field) == value
    assert caught[0].filename == __file__
    assert str(tmp_path) in str(caught[0].message)


def test_a_regular_expression_with_layers_and_a_pattern_gives_both_warnings(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="is ignored") as caught:
        config = GraloraConfig.from_pretrained(
            write(tmp_path, target_modules="q.*", layers_to_transform=[0], layers_pattern="h")
        )
    assert len(caught) == 2
    assert (config.layers_to_transform, config.layers_pattern) == (None, None)


def test_the_papers_format_is_converted(tmp_path: Path) -> None:
    """Its `r` counts `hybrid_r` in, and its scale is `gralora_alpha / r`; PEFT would read 16 here."""
    write(tmp_path, r=32, hybrid_r=8, gralora_alpha=64, gralora_k=4, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=r"paper's own code: read as r=24, hybrid_r=8, alpha=64") as caught:
        config = GraloraConfig.from_pretrained(tmp_path)
    assert (config.r, config.hybrid_r, config.alpha, config.scale) == (24, 8, 64, 2.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("fields", [{"r": 16, "gralora_alpha": 32}, {"r": 16, "hybrid_r": 0, "gralora_alpha": 32}])
def test_the_papers_format_without_a_hybrid_part(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="paper's own code"):
        config = GraloraConfig.from_pretrained(write(tmp_path, **fields))
    assert (config.r, config.hybrid_r, config.scale) == (16, 0, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json is not valid JSON"),
        ("", "adapter_config.json is not valid JSON"),
        ("[1]", "holds a list, not an object; save the adapter again"),
        ('{"peft_type": "LORA", "r": 8}', "peft_type is 'LORA', not 'GRALORA'; give a GraLoRA adapter"),
        ("{}", "peft_type is None, not 'GRALORA'"),
        ('{"peft_type": "GRALORA", "r": 5}', "r should be divisible by gralora_k, but got 5 and 2"),
        ('{"peft_type": "GRALORA", "r": "x"}', "r must be .*'x'"),
        ('{"peft_type": "GRALORA", "gralora_alpha": 4, "r": "x"}', "r must be .*'x'"),
        ('{"peft_type": "GRALORA", "gralora_alpha": 4, "r": 4, "hybrid_r": 4}', "r must be .*0"),
        ('{"peft_type": "GRALORA", "gralora_dropout": 3}', "gralora_dropout must be .*3"),
        ('{"peft_type": "GRALORA", "gralora_dropout": null}', "gralora_dropout must be .*None"),
    ],
)
def test_a_bad_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=message):
            GraloraConfig.from_pretrained(tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        GraloraConfig.from_pretrained(tmp_path)


def test_places_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"no adapter_config.json in {tmp_path}, which is empty; give the directory of a saved"
    ):
        GraloraConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no directory .*absent; give an existing directory or a hub id"):
        GraloraConfig.from_pretrained(tmp_path / "absent")
    with pytest.raises(ConfigError, match="is a file; give the directory that holds it"):
        GraloraConfig.from_pretrained(__file__)
    with pytest.raises(ConfigError, match="no directory owner/absent, and no such repository can be reached"):
        GraloraConfig.from_pretrained("owner/absent")


def test_fields_of_a_later_peft_are_refused_where_they_are_used(tmp_path: Path) -> None:
    assert GraloraConfig.from_pretrained(write(tmp_path, r=8, peft_version="9.9", novelty=False)).r == 8
    with pytest.raises(ConfigError, match="novelty=True is not supported"):
        GraloraConfig.from_pretrained(write(tmp_path, r=8, peft_version="9.9", novelty=True))


@pytest.mark.parametrize(
    ("config", "field", "remedy"),
    [
        (GraloraConfig, "lora_alpha", "use alpha"),
        (GraloraConfig, "gralora_alpha", "use alpha"),
        (GraloraConfig, "lora_dropout", "use gralora_dropout"),
        (GraloraConfig, "dropout", "use gralora_dropout"),
        (GraloraConfig, "rank", "use r"),
        (GraloraConfig, "k", "use gralora_k"),
        (GraloraConfig, "init_lora_weights", "use init_weights"),
        (GraloraConfig, "target_module", "use target_modules"),
        (GraloraConfig, "use_rslora", "it is rsLoRA, which LoraConfig has"),
        (LoraConfig, "alpha", "use lora_alpha"),
        (LoraConfig, "gralora_dropout", "use lora_dropout"),
        (LoraConfig, "gralora_k", "it is GraLoRA's number of blocks, which GraloraConfig has"),
        (LoraConfig, "k", "it is GraLoRA's number of blocks, which GraloraConfig has"),
        (LoraConfig, "velocity", "its fields are r, target_modules, .*, alora_invocation_tokens"),
        (DoraConfig, "alpha", "use lora_alpha"),
        (DoraConfig, "hybrid_r", "it is the LoRA beside GraLoRA's blocks, which GraloraConfig has"),
    ],
)
def test_a_field_of_a_neighbouring_configuration_is_refused_with_the_one_to_use(
    config: type[AdapterConfig], field: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{config.__name__} has no field {field}[:;] {remedy}$"):
        config(**{field: 16})


@pytest.mark.parametrize("config", [GraloraConfig, LoraConfig, DoraConfig])
def test_the_signature_of_a_configuration_lists_its_fields(config: type[AdapterConfig]) -> None:
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    assert list(inspect.signature(config).parameters) == fields


def test_a_live_object_of_another_method() -> None:
    with pytest.raises(ConfigError, match="the given LoraConfig: peft_type is 'LORA', not 'GRALORA'"):
        GraloraConfig.from_peft(peft.LoraConfig())


def test_the_module_does_not_import_peft() -> None:
    code = "import sys, gralora_fx.core.config; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["("]},
        {"layers_to_transform": [0], "layers_pattern": "("},
        {"alpha": 10**400},
        {"r": 2**40},
    ],
    ids=str,
)
def test_values_that_would_fail_later_are_refused_now(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(fields))):
        GraloraConfig(**fields)
