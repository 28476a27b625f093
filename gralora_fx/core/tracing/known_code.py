"""Model code that a trace recognises, and replaces by operators or by code that can be traced: a row for each.

transformers' models copy functions from each other verbatim. Equal code computes the same, so one replacement serves
all of them: the graph is easier to match, and tracing takes half the time. The trace is compared with the model
afterwards, which finds a replacement that is no longer right. A replacement is imported once a model has the code.
"""

from __future__ import annotations

import dis
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from torch import nn

from gralora_fx.base.patches import patched_here, unpatched
from gralora_fx.core.graph.same_value import same_value

_MODELS = "transformers.models"
_PATCHES = __name__.rpartition(".")[0]
_PARTS = attrgetter(
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable"),
    *("co_argcount", "co_kwonlyargcount", "co_posonlyargcount"),
)
INDEXER = "Indexer"  # end of the names of classes that choose keys


@dataclass(frozen=True)
class Recognised:
    """Code of one model, which others may have copied, and its replacement."""

    # A method or a function by its path below `transformers.models`, as in
    # `"llama.modeling_llama:LlamaRMSNorm.forward"`. It is imported once a model has code of that name.
    place: str
    # A function by its path below `folder`, as `"other_layers:drop_path"`. It takes the same arguments and returns the
    # same results; a method's takes the module first. It is imported once a model has the code.
    replacement: str
    # end of the names of the classes that may have the method, or several such endings
    ending: str | tuple[str, ...] = ""
    beside: tuple[str, ...] = ()  # functions or methods that must be of the same code too, since it calls them
    fits: Callable[[Any], bool] = lambda _: True  # whether the replacement is for this module
    folder: str = _PATCHES  # the package of the replacement

    @property
    def path(self) -> list[str]:
        """The function's name, after its class's name if it is a method."""
        return self.place.partition(":")[2].split(".")

    def is_method_of(self, kind: type[nn.Module]) -> bool:
        """Return whether a class has the method and those of `beside`."""
        names = (self.path[-1], *self.beside)
        is_one = len(self.path) == 2 and kind.__name__.endswith(self.ending)
        if not is_one or not all(hasattr(kind, name) for name in names):
            return False
        own = getattr(self._module(), self.path[0])
        return all(same_code(getattr(kind, name), getattr(own, name)) for name in names)

    def is_function_of(self, module: ModuleType) -> bool:
        """Return whether a Python module has the function and those of `beside`."""
        names = (*self.path, *self.beside)
        has_names = len(self.path) == 1 and all(hasattr(module, name) for name in names)
        return has_names and all(same_code(getattr(module, name), getattr(self._module(), name)) for name in names)

    def replaces_in(self, module: nn.Module) -> bool:
        """Return whether a module has the method, and the replacement is for such a module."""
        return self.path[-1] not in vars(module) and self.is_method_of(type(module)) and self.fits(module)

    def load(self) -> Callable[..., Any]:
        """Import the replacement."""
        file, _, name = self.replacement.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"{self.folder}.{file}"), name)
        return function

    def replaced_in(self, model: nn.Module, changed: ExitStack) -> None:
        """Replace the code wherever a model has it, until the stack is closed."""
        name = self.path[-1]
        for module in model.modules():
            if self.replaces_in(module):
                changed.enter_context(patch.object(module, name, functools.partial(self.load(), module)))
        for owner in sorted({type(module).__module__ for module in model.modules()} & sys.modules.keys()):
            if self.is_function_of(sys.modules[owner]):
                changed.enter_context(patched_here(sys.modules[owner], name, self.load()))

    def _module(self) -> ModuleType:
        return importlib.import_module(f"{_MODELS}.{self.place.partition(':')[0]}")


def same_code(one: Any, other: Any) -> bool:
    """Return whether two functions are of equal code, over equal defaults, globals and closures; not, if in doubt."""
    return _alike(one, other, set())


def _alike(one: Any, other: Any, compared: set[tuple[int, int]]) -> bool:
    """Return whether two functions are equal, or two other values the same; pairs once compared are not again."""
    one, other = (unpatched(each) if isinstance(each, FunctionType) else each for each in (one, other))
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return same_value(one, other)
    if one is other or (id(one), id(other)) in compared:
        return True
    compared.add((id(one), id(other)))
    if not _equal_codes(one.__code__, other.__code__):
        return False
    read = [[function.__defaults__, function.__kwdefaults__] for function in (one, other)]
    return same_value(*read) and all(
        _alike(values, others, compared) for values, others in zip(_read(one), _read(other), strict=True)
    )


def _equal_codes(one: CodeType, other: CodeType) -> bool:
    """Return whether two codes are equal but for locations and docstrings, which no instruction loads."""
    if _PARTS(one) != _PARTS(other):
        return False
    constants = [[at.argval for at in dis.get_instructions(code) if at.opcode in dis.hasconst] for code in (one, other)]
    return all(
        _equal_codes(value, constant)
        if isinstance(value, CodeType) and isinstance(constant, CodeType)
        else same_value(value, constant)
        for value, constant in zip(*constants, strict=True)
    )


def _read(function: FunctionType) -> list[Any]:
    """Return the values of a function's closure and of the globals that it may read."""
    codes, names = [function.__code__], list[str]()
    for code in codes:
        names += code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    closure = [cell if cell == CellType() else cell.cell_contents for cell in function.__closure__ or ()]
    return [*closure, *(function.__globals__.get(name) for name in names)]


@contextmanager
def replaced(model: nn.Module, table: Sequence[Recognised]) -> Iterator[None]:
    """Replace a model's recognised code within the block."""
    with ExitStack() as changed:
        for code in table:
            code.replaced_in(model, changed)
        yield


def _rotates_all(module: Any) -> bool:
    return "dynamic" not in module.rope_type and module.rope_type != "longrope"


DROP_PATH = Recognised(
    "swin.modeling_swin:SwinDropPath.forward",
    "other_layers:drop_path",
    ending="DropPath",
    fits=lambda module: isinstance(module.drop_prob, float),
)
SAME_PADDING = (
    Recognised(
        "mobilenet_v1.modeling_mobilenet_v1:apply_tf_padding", "other_layers:same_padding"
    ),  # dilations are all one
    Recognised("mobilenet_v2.modeling_mobilenet_v2:apply_tf_padding", "other_layers:same_padding"),
)
BLOCK_SPARSE_ATTENTION = Recognised(
    "qwen4_exp.modeling_qwen4_exp:Qwen4ExpTextQSAIndexer.forward",
    "sparse_attention:chosen",
    ending="QSAIndexer",
    fits=lambda module: module.index_kv_heads == 1,
)
IN_EVERY_MODEL = (DROP_PATH, *SAME_PADDING, BLOCK_SPARSE_ATTENTION)

RMS_NORM = Recognised("llama.modeling_llama:LlamaRMSNorm.forward", "decoder_operators:norm")
ROTARY_EMBEDDING = Recognised(
    "llama.modeling_llama:apply_rotary_pos_emb", "decoder_operators:rotate_both", beside=("rotate_half",)
)
ANGLES_OF_GRIDS = Recognised(
    "qwen3_5.modeling_qwen3_5:Qwen3_5TextRotaryEmbedding.forward",
    "decoder_operators:angles_of_grids",
    ending="RotaryEmbedding",
    beside=("recomposition_frequencies",),  # which leaves equal angles as they are
    fits=_rotates_all,
)
IN_DECODERS = (RMS_NORM, ROTARY_EMBEDDING, ANGLES_OF_GRIDS)

# attention that models compute by themselves, not through transformers' interface
ATTENTIONS = (
    Recognised(
        "falcon.modeling_falcon:FalconAttention.forward",
        "decoder_operators:falcon",
        ending="FalconAttention",
        fits=lambda module: not module.config.alibi,  # a bias for each head is more than a mask
    ),
)


def has_key_indexer(model: nn.Module) -> bool:
    """Return whether a decoder's key indexer keeps the positions of all tokens."""
    return any(type(part).__name__.endswith("QSAIndexer") for part in model.modules())
