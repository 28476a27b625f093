"""Plug-in execution providers, from separate packages: finding, registering and listing their devices."""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnxruntime

from gralora_fx.base.compat.packages import installation
from gralora_fx.errors import ServingError, first_line

_PREFIX = "onnxruntime_ep_"  # of the modules of plug-in packages
_MODULES = {  # of known providers
    "OpenVINOExecutionProvider": "onnxruntime_ep_openvino",
    "WebGpuExecutionProvider": "onnxruntime_ep_webgpu",
    "QNNExecutionProvider": "onnxruntime_qnn",
}
_INSTALL = {  # how to get a provider that the onnxruntime package itself does not have
    "OpenVINOExecutionProvider": installation("openvino"),
    "WebGpuExecutionProvider": "pip install onnxruntime-ep-webgpu",
    "QNNExecutionProvider": "pip install onnxruntime-qnn",
    "CUDAExecutionProvider": "pip install onnxruntime-gpu in place of onnxruntime",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu in place of onnxruntime",
    "MIGraphXExecutionProvider": "pip install onnxruntime-migraphx in place of onnxruntime",
    "CoreMLExecutionProvider": "pip install onnxruntime on macOS",
    "DmlExecutionProvider": "pip install onnxruntime-directml on Windows",
}
_NEEDS = {  # requirements of providers whose own error only says that no device was found
    "OpenVINOExecutionProvider": "a processor, GPU or NPU of Intel",
    "QNNExecutionProvider": "a Qualcomm device",
    "WebGpuExecutionProvider": "a GPU",
}
_lock = threading.Lock()
_registered: set[str] = set()  # modules whose library was registered here
_brought: set[str] = set()  # providers that became available with them


@dataclass(frozen=True)
class Device:
    """A device of a plug-in provider."""

    provider: str
    kind: str  # `CPU`, `GPU` or `NPU`; for OpenVINO its own name of the device, such as `GPU.1`
    name: str  # the provider's description of it
    version: str  # version of the provider
    properties: Mapping[str, str] = field(repr=False, compare=False)  # the provider's properties of it
    handle: Any = field(repr=False, compare=False)  # the `onnxruntime.OrtEpDevice`

    def __str__(self) -> str:
        """Return the provider, its version and the device."""
        return f"{self.provider} {self.version} on {self.kind} ({self.name})"


def devices_of(provider: str) -> tuple[Device, ...]:
    """Return a plug-in provider's devices, registering its package's library once per process."""
    with _lock:
        if found := registered_devices(provider):
            return found
        available = onnxruntime.get_available_providers()
        if provider in available:
            return ()
        for module_name in _candidates(provider):
            is_brought = _register(module_name, provider)
            if found := registered_devices(provider):
                return found
            if is_brought:
                needs = _NEEDS.get(provider.partition(".")[0], "a device that it supports")
                raise ServingError(
                    f"execution provider {provider} ({_package(module_name)}) runs on no device of this machine: it "
                    f"needs {needs}, and there are {_hardware()}; leave it out"
                )
    advice = f"; {_INSTALL[provider]} brings it" if provider in _INSTALL else ""
    raise ServingError(f"execution provider {provider} is not installed; there are {', '.join(available)}{advice}")


def registered_devices(provider: str) -> tuple[Device, ...]:
    """Return the devices of a plug-in provider whose library is registered."""
    handles = [handle for handle in onnxruntime.get_ep_devices() if handle.ep_name == provider]
    # ONNX Runtime lists built-in providers' devices too; older versions do not mark those of a library
    return tuple(_device(handle) for handle in handles if provider in _brought or "library_path" in handle.ep_metadata)


def choose_device(devices: tuple[Device, ...], kind: object = None) -> Device:
    """Return the device of a kind; by default the CPU, else the first."""
    if kind is None:
        return next((device for device in devices if device.kind == "CPU"), devices[0])
    chosen = next((device for device in devices if kind in (device.kind, device.kind.partition(".")[0])), None)
    if chosen is None:
        there = ", ".join(dict.fromkeys(f"{device.kind} ({device.name})" for device in devices))
        raise ServingError(f"{devices[0].provider} has no device of type {kind!r:.80}; there are {there}")
    return chosen


def _device(handle: Any) -> Device:
    properties = dict(handle.ep_metadata)
    kind = properties.get("ov_device", handle.device.type.name)
    name = properties.get("FULL_DEVICE_NAME", handle.device.vendor)
    return Device(handle.ep_name, kind, name, properties.get("version", "of unknown version"), properties, handle)


def _candidates(provider: str) -> Iterator[str]:
    """Return modules of installed packages that may provide it: the known one, or all not known for others."""
    installed = {module.name for module in pkgutil.iter_modules()}
    if known := _MODULES.get(provider.partition(".")[0]):
        yield from installed & {known}
        return
    unknown = (name for name in installed if name.startswith(_PREFIX) and name not in _MODULES.values())
    yield from sorted(unknown)


def _register(module_name: str, provider: str) -> bool:
    """Register a package's library, unless the package says that it has other providers."""
    path = module_name
    try:
        module = importlib.import_module(module_name)
        names = module.get_ep_names() if hasattr(module, "get_ep_names") else None
        if names is not None and provider.partition(".")[0] not in names:
            return False
        if module_name not in _registered:
            path, before = module.get_library_path(), _providers_with_devices()
            onnxruntime.register_execution_provider_library(f"gralora-fx:{module_name}", path)
            _brought.update(_providers_with_devices() - before)
    except Exception as failure:  # a package's own code, and ONNX Runtime's types without a common base
        raise ServingError(
            f"the execution provider package {_package(module_name)} cannot be loaded from {path} "
            f"({first_line(failure)}); install it again, or leave {provider} out"
        ) from failure
    _registered.add(module_name)
    return names is not None


def _providers_with_devices() -> set[str]:
    return {handle.ep_name for handle in onnxruntime.get_ep_devices()}


def _package(module_name: str) -> str:
    """Return a module's package with its version, if installed as one."""
    name = module_name.replace("_", "-")
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def _hardware() -> str:
    """List this machine's devices known to ONNX Runtime."""
    devices = [handle.device for handle in onnxruntime.get_ep_devices()]
    return ", ".join(dict.fromkeys(f"{device.type.name} ({device.vendor})" for device in devices))
