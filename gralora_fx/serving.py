"""An export on ONNX Runtime: loaded, or served over HTTP."""

from typing import TYPE_CHECKING

from gralora_fx import first_use

if TYPE_CHECKING:
    from gralora_fx.core.config.service_settings import ConnectionLimits, ServiceSettings
    from gralora_fx.run.call_arrays import Outputs
    from gralora_fx.run.engine.decoder import Decoder
    from gralora_fx.run.model import OrtModel, load
    from gralora_fx.service.app import create_app

__all__ = ["ConnectionLimits", "Decoder", "OrtModel", "Outputs", "ServiceSettings", "create_app", "load"]

_HOMES = {
    "ConnectionLimits": "core.config.service_settings",
    "Decoder": "run.engine.decoder",
    "OrtModel": "run.model",
    "Outputs": "run.call_arrays",
    "ServiceSettings": "core.config.service_settings",
    "create_app": "service.app",
    "load": "run.model",
}

__getattr__ = first_use(__name__, _HOMES)
