"""Explanations of failed traces: the reason in a sentence, and the place in the user's code."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import fx, nn

from gralora_fx.errors import an, first_line

_BRANCH = (
    "the forward needs the value of a tensor (in an if, a while, int(), range() or a size), which a graph does not "
    "have; choose with torch.where or torch.cond, or give the value as an argument of its own"
)
# PyTorch's messages for failed traces, and what they mean for the author of the forward
_REASONS = (
    (r"Could not (guard on|extract specialized integer from) data-dependent", _BRANCH),
    (r"data-dependent (expression|control flow)", _BRANCH),
    (r"\.numpy\(\) is not supported", "the forward leaves PyTorch for numpy; compute with tensors"),
    (
        r"two devices|same device|Device Propagation",
        "tensors of two devices meet; put the model and the example inputs on one",
    ),
    (
        r"fake tensor in the exported program",
        "the forward computes with a tensor that a graph does not see, such as `.data`; use `.detach()`",
    ),
    (r"being vmapped", "the forward calls `torch.vmap`, which a graph cannot hold; compute with the whole batch"),
)
# torch 2.11's message for a set, the only type that gets this far
_UNKNOWN_OUTPUT = re.compile(r"Found <class '(.+)'> in output, which is not a known type|unhashable type: '(set)'")
_OWN = Path(__file__).parents[2]
_TORCH = Path(torch.__file__).parent
_STDLIB, _SITE = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))


def reason(error: BaseException) -> str:
    """Explain an error raised while tracing, in one sentence."""
    text = str(error)
    unknown = _UNKNOWN_OUTPUT.search(text)
    if unknown is not None:
        name = (unknown[1] or unknown[2]).rsplit(".", 1)[-1]
        return (
            f"the forward returns {an(name)}, which a graph cannot make; return tensors, or a tuple, list, dict or "
            "dataclass of them"
        )
    explanation = next((meaning for pattern, meaning in _REASONS if re.search(pattern, text)), None)
    return explanation or first_line(error)


def where(model: nn.Module, error: BaseException) -> str:
    """Return the innermost module and line of the model in a traceback, in the user's own code if possible."""
    paths = {id(module): path or "the root module" for path, module in model.named_modules()}
    for link in _chain(error):
        inner, location, user_location = "the root module", "", ""
        for frame, line in traceback.walk_tb(link.__traceback__):
            inner = paths.get(id(_first_argument(frame)), inner)
            file = Path(frame.f_code.co_filename)
            if _is_code(file):
                location = f" at {inner} ({file.name}:{line})"
                user_location = user_location if file.is_relative_to(_SITE) else location
        if user_location or location:
            return user_location or location
    return where_defined(model)


def where_defined(model: nn.Module) -> str:
    """Return the file and line of a model's forward; empty if it has no code."""
    forward = inspect.unwrap(type(model).forward)
    code = getattr(forward, "__code__", None)
    return "" if code is None else f" ({Path(code.co_filename).name}:{code.co_firstlineno})"


def line_of(stack_trace: str | None) -> str:
    """Return the file and line of the user's own code in a node's stack trace; empty if there is none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    lines = [f"{Path(file).name}:{line}" for file, line in frames if _is_code(Path(file))]
    return lines[-1] if lines else ""


def call_named(node: fx.Node) -> str:
    """Return the operator that a node calls, with the user's line if it is known."""
    location = line_of(node.meta.get("stack_trace"))
    return f"{node.target} at {location}" if location else str(node.target)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _first_argument(frame: FrameType) -> object:
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return frame.f_locals.get(names[0]) if names else None


def _is_code(file: Path) -> bool:
    if file.name.startswith("<") or file.is_relative_to(_TORCH) or file.is_relative_to(_OWN):
        return False
    is_exporter = "transformers" in file.parts and "exporters" in file.parts
    return not is_exporter and (file.is_relative_to(_SITE) or not file.is_relative_to(_STDLIB))
