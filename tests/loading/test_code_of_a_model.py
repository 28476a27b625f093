"""Code that comes with a model is never run, whatever answers the question that transformers would ask."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gralora_fx.core.loading.models import load_model, load_streamed, make_empty
from gralora_fx.core.loading.tokenizers import load_tokenizer
from gralora_fx.errors import GraloraError

CODE = """
from pathlib import Path
Path({place!r}).touch()
"""


@pytest.mark.parametrize("load", [load_model, load_streamed, load_tokenizer, lambda folder: make_empty(folder, None)])
def test_a_model_with_code_of_its_own_is_refused(
    load: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    names = {name: f"own.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    tokenizer = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(CODE.format(place=str(tmp_path / "ran")))
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    with pytest.raises(GraloraError, match="model"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    assert asked == []
