"""Float weights rounded to four bits, as bitsandbytes rounds the base that a QLoRA adapter is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.compat.extras import installation
from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.safetensors_files import FLOATS
from gralora_fx.errors import ConfigError, option
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.features.nf4.stored import scales_of, values_of


def rounded(weight: NDArray[Any], quantization: FourBits) -> NDArray[np.float32]:
    """Return a float weight `[out, in]` as its layer in bitsandbytes multiplies by it, in float32.

    bitsandbytes rounds it. What it rounded to is read as from a file, since its own kernel for processors with AVX-512
    reads rows wrong that are not a whole number of blocks (0.50; those for GPUs do not).
    """
    import torch

    try:
        with quiet():
            from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise ConfigError(
            f"{option(base_quantization=str(quantization))} needs bitsandbytes, which rounds the base as it did for "
            f"the adapter ({error}): {installation(quantization.extra)}. A base that it saved in four bits is read "
            "without it"
        ) from error
    values = torch.from_numpy(np.array(weight, np.float32, order="C"))
    codes, state = quantize_4bit(
        values,
        blocksize=quantization.block_size,
        compress_statistics=quantization.double,
        quant_type=quantization.kind,
    )
    scales = state.absmax.numpy()
    if quantization.double:
        outer = state.state2
        scales = scales_of(scales, 0, outer.code.numpy(), outer.absmax.numpy(), outer.blocksize, float(state.offset))
    packed, table = codes.reshape(-1).numpy(), state.code.numpy()
    floats = values_of(packed, scales, table, quantization.block_size, 0, values.numel()).reshape(weight.shape)
    return floats.astype(FLOATS[quantization.stored_dtype], copy=False).astype(np.float32, copy=False)
