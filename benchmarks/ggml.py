"""llama.cpp's quantizers as a side of a benchmark, called by the C functions in the package `xllamacpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INSTALL = "pip install --no-deps xllamacpp gguf"
_SUPER = 256  # values of a super-block of k-quants
# llama.cpp's fallbacks for rows that are not whole super-blocks (`llama-quant.cpp`, `tensor_type_fallback`)
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


class Quantized(NamedTuple):
    """Matrices quantized by llama.cpp, dequantized."""

    values: Mapping[str, NDArray[np.float32]]  # the values of each matrix `[out, in]`, float32
    stored_bits: int  # total bits, with scales and minima
    types: Mapping[str, int]  # number of matrices by type


def is_installed() -> bool:
    """Return whether both packages are installed."""
    return find_spec("xllamacpp") is not None and find_spec("gguf") is not None


def quantized(matrices: Mapping[str, NDArray[np.float32]], recipe: str, layers: int) -> Quantized:
    """Quantize a Llama's matrices by a recipe of llama.cpp, `Q4_1` or `Q4_K_M`.

    `matrices` are those of linear layers, `[out, in]`, by transformers' names, a tied head's included.
    """
    import gguf

    values: dict[str, NDArray[np.float32]] = {}
    bits, types = 0, dict[str, int]()
    for name, matrix in matrices.items():
        kind = _type_of(name, matrix.shape[1], recipe, layers)
        packed = _quantize(np.ascontiguousarray(matrix), gguf.GGMLQuantizationType[kind])
        values[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).astype(np.float32)
        bits += 8 * packed.nbytes
        types[kind] = types.get(kind, 0) + 1
    return Quantized(values, bits, types)


def _type_of(name: str, width: int, recipe: str, layers: int) -> str:
    """Return the type that llama.cpp gives a matrix (`llama-quant.cpp`, `llama_tensor_get_type`)."""
    kind = "Q4_K" if recipe == "Q4_K_M" else recipe
    if name == "lm_head":
        kind = "Q6_K"
    elif recipe == "Q4_K_M" and name.split(".")[-1] in ("v_proj", "down_proj"):
        layer, eighth = int(name.split(".layers.")[1].split(".")[0]), layers // 8
        has_more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        kind = "Q6_K" if has_more else kind
    return kind if width % _SUPER == 0 else _FALLBACK.get(kind, kind)


def _quantize(matrix: NDArray[np.float32], kind: Any) -> NDArray[np.uint8]:
    """Quantize `[out, in]` to packed rows with `ggml_quantize_chunk`."""
    import gguf
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = matrix.shape
    packed = np.empty((rows, width // block * size), np.uint8)
    written = function(int(kind), matrix.ctypes.data, packed.ctypes.data, 0, rows, width, None)
    assert written == packed.nbytes, f"ggml_quantize_chunk wrote {written} bytes for {packed.nbytes}"
    return packed
