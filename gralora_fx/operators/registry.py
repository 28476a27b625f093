"""All operators of this project: importing this module registers each with torch."""

from gralora_fx.operators import (
    attention,
    constant_sizes,
    dot_product_attention,
    drop_path,
    linear_and_cat,
    mask,
    rms_norm,
    rotary,
)

MODULES = (attention, constant_sizes, dot_product_attention, drop_path, linear_and_cat, mask, rms_norm, rotary)
