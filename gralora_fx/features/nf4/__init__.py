"""NF4: bases that bitsandbytes stored in four bits, or that are rounded as it does for QLoRA."""
