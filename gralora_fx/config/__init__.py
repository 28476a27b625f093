"""What to adapt and how: the configurations, and PEFT's `adapter_config.json`."""

from gralora_fx.config.adapter_config import AdapterConfig
from gralora_fx.config.gralora_config import GraloraConfig
from gralora_fx.config.reading import CONFIG_NAME

__all__ = ["CONFIG_NAME", "AdapterConfig", "GraloraConfig"]
