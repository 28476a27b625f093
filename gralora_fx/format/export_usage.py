"""A line of Python and a command that use an export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gralora_fx.base.progress.report import Invocation
from gralora_fx.format.tasks import find_task, generates

_PROMPT = "The capital of France is"
_LOAD = "from gralora_fx.serving import load; "
_TOKENIZER = "tokenizer_config.json"
COMPARING, _GENERATING, _SERVING = "gralora-fx verify", "gralora-fx generate", "gralora-fx serve"


def comparison_of(directory: str | Path) -> Invocation:
    """Return the call that compares an export with its model; the command needs the model's options too."""
    place = str(directory)
    python = f"from gralora_fx.exporters import verify_onnx; verify_onnx({place!r}, model)"
    return Invocation(python, COMPARING, {"onnx": place})


def usage_of(
    directory: str | Path,
    task: str | None,
    files: Iterable[str],
    inputs: Iterable[str] = (),
    adapter: str | None = None,
) -> Invocation:
    """Return a call that runs an export: with a prompt if it generates, else with its inputs."""
    place, chosen = str(directory), "" if adapter is None else f", adapter={adapter!r}"
    given = {"onnx": place} | ({} if adapter is None else {"adapter": adapter})
    loaded, has_tokenizer = f"load({place!r})", _TOKENIZER in files
    known, is_generating = find_task(task), generates(task)
    if is_generating and known is not None and known.example:
        call = f"{_LOAD}print({loaded}.generate({known.example}{chosen}))"
        return Invocation(call, _GENERATING, {**given, **known.example_options})
    if is_generating and has_tokenizer:
        return Invocation(
            f"{_LOAD}print({loaded}.generate({_PROMPT!r}{chosen}))", _GENERATING, {**given, "prompt": _PROMPT}
        )
    if is_generating:
        return Invocation(f"{_LOAD}print({loaded}.generate([[1, 2, 3]]{chosen}))")
    if has_tokenizer:
        call = f"model = {loaded}; model(**model.tokenizer(['A text'], return_tensors='np'){chosen})"
        return Invocation(_LOAD + call, _SERVING, {"onnx": place})
    values = ", ".join(f"{name}=..." for name in inputs) or "..."
    return Invocation(f"{_LOAD}{loaded}({values}{chosen})", _SERVING, {"onnx": place})
