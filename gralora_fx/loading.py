"""Base models by name or directory, as the command line loads them."""

from typing import TYPE_CHECKING

from gralora_fx import first_use

if TYPE_CHECKING:
    from gralora_fx.core.loading.models import load_model, load_streamed

__all__ = ["load_model", "load_streamed"]

__getattr__ = first_use(__name__, dict.fromkeys(__all__, "core.loading.models"))
