"""What to adapt and how: the configurations, and PEFT's `adapter_config.json`."""

from gralora_fx.config.adapter_config import CONFIG_NAME, AdapterConfig
from gralora_fx.config.gralora_config import GraloraConfig

__all__ = ["CONFIG_NAME", "AdapterConfig", "GraloraConfig"]
