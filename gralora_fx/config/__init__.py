"""What to adapt and how: `GraloraConfig` and PEFT's `adapter_config.json`."""

from gralora_fx.config.gralora_config import CONFIG_NAME, GraloraConfig

__all__ = ["CONFIG_NAME", "GraloraConfig"]
