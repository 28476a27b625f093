"""NF4: bases that bitsandbytes stored in four bits, or that are rounded as it does for QLoRA."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "nf4",
    signs=frozenset({"bitsandbytes__nf4", "bitsandbytes__fp4", "absmax", "quant_map"}),
    parts={"weight forms": "four_bits:FourBits", "stored weights": "stored:unpacked", "rounding": "rounding:rounded"},
)
