"""Another method is one class in one file, and one line that registers it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from outer_method import Outer, OuterConfig
from tiny_models import text_batch
from traces import fresh_trace, main_output, relative_error, run

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite
from gralora_fx.core.methods import METHODS, AdapterMethod, method_of, read_config, register
from gralora_fx.errors import ConfigError
from gralora_fx.exporters import export_onnx


@pytest.fixture
def outer() -> Iterator[AdapterMethod]:
    method = register(Outer())
    yield method
    METHODS.remove(method)


@pytest.mark.usefixtures("outer")
def test_a_registered_method_does_all_that_the_others_do(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("bert"), OuterConfig(target_modules={"query", "value"}, scale=2.0))
    inputs = text_batch()
    assert torch.equal(run(model, inputs), run(model.traced, inputs))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        main_output(model(**inputs)).square().mean().backward()
        optimizer.step()
    model.eval()
    trained = run(model, inputs)
    assert not torch.equal(trained, run(model.traced, inputs))
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(read_config(tmp_path / "adapter"), OuterConfig)
    loaded = GraloraModel.from_pretrained(fresh_trace("bert"), tmp_path / "adapter")
    assert torch.equal(run(loaded, inputs), trained)
    assert relative_error(run(merge(loaded), inputs), trained) < 1e-5
    report = export_onnx(loaded, tmp_path / "onnx")
    assert report.verification is not None
    loaded.add_adapter("gralora", GraloraConfig(r=4, target_modules=["query"], init_weights=False))
    loaded.add_weighted_adapter(["default", "gralora"], [1.0, 1.0], "sum")
    loaded.set_adapter(["default", "gralora"])
    both = run(loaded, inputs)
    loaded.set_adapter("sum")
    assert relative_error(run(loaded, inputs), both) < 1e-5


def test_a_method_that_is_not_registered_is_named(tmp_path: Path) -> None:
    config = OuterConfig(target_modules={"query"})
    message = "'OUTER' .peft_type. is not registered; registered are GRALORA, LORA.*gralora_fx.methods.register"
    with pytest.raises(ConfigError, match=f"the OuterConfig: the method {message}"):
        method_of(config)
    with pytest.raises(ConfigError, match=message):
        rewrite(fresh_trace("bert"), config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"adapter_config.json: the method {message}"):
        read_config(tmp_path)


@pytest.mark.usefixtures("outer")
def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="a method 'OUTER' is registered already"):
        register(Outer())
