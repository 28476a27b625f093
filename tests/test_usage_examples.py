"""Eight ways to write a configuration, each on a model that it suits: PEFT's modules, and PEFT's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from peft_oracle import adapted_paths, saved_by_peft
from traces import fresh_trace, inputs_of, relative_error, run

from gralora_fx import GraloraConfig, GraloraModel, plan, rewrite


@dataclass(frozen=True)
class Example:
    """A configuration and the model it is for.

    Attributes:
        model: Name of the tiny model.
        fields: Fields of the configuration.
        sites: Number of modules that it adapts.
        scale: The factor of the adapter's output.
        sizes: Other sizes of the model.
    """

    model: str
    fields: Mapping[str, Any] = field(hash=False)
    sites: int
    scale: float
    sizes: Mapping[str, Any] = field(default_factory=dict, hash=False)


EXAMPLES = {
    "basic": Example("llama", {"r": 32, "target_modules": ["q_proj", "v_proj"]}, sites=4, scale=2.0),
    "four blocks and dropout": Example(
        "llama",
        {"r": 64, "gralora_k": 4, "gralora_dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        sites=8,
        scale=1.0,
    ),
    "hybrid": Example(
        "mistral",
        {"r": 32, "hybrid_r": 8, "alpha": 80, "target_modules": ["q_proj", "v_proj"]},
        sites=4,
        scale=2.0,
    ),
    "all-linear": Example("opt", {"target_modules": "all-linear"}, sites=12, scale=2.0),
    "regular expression": Example(
        "t5", {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"}, sites=8, scale=2.0
    ),
    "first four layers": Example(
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 1, 2, 3],
            "layers_pattern": "layers",
        },
        sites=8,
        scale=2.0,
        sizes={"num_hidden_layers": 5},
    ),
    "biases and a head": Example(
        "bert",
        {
            "target_modules": ["query", "value"],
            "gralora_dropout": 0.05,
            "bias": "gralora_only",
            "modules_to_save": ["classifier"],
        },
        sites=4,
        scale=2.0,
    ),
    "Conv1D": Example("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, sites=6, scale=2.0),
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_adapts_pefts_modules_and_gives_pefts_logits(example: Example, tmp_path: Path) -> None:
    theirs = saved_by_peft(example.model, tmp_path, sizes=example.sizes, **example.fields)
    base = fresh_trace(example.model, **example.sizes)
    config = GraloraConfig(**example.fields)
    paths = {entry.site.path for entry in plan(base, config).selected}
    assert paths == adapted_paths(theirs)
    assert len(paths) == example.sites
    assert config.scale == example.scale
    ours = GraloraModel.from_pretrained(base, tmp_path)
    inputs = inputs_of(example.model)
    expected = run(theirs, inputs)
    assert relative_error(run(ours, inputs), expected) < 1e-5
    assert relative_error(run(base, inputs), expected) > 1e-3, "the adapter does nothing, so nothing was tested"
    untrained = rewrite(base, config)
    assert untrained.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    assert relative_error(run(untrained, inputs), run(base, inputs)) == 0
