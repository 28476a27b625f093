"""NF4: bases stored in bitsandbytes' four bits, or rounded to them for QLoRA."""
