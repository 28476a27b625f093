"""Checked options of ONNX Runtime: execution providers, session options, and threads for the available cores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from gralora_fx.errors import ServingError, first_line, option, warn_caller
from gralora_fx.run.sessions.session import CPU, Runtime, quiet_options

if TYPE_CHECKING:
    from gralora_fx.run.sessions.plugins import Device

Providers = str | Sequence[str | tuple[str, Mapping[str, Any]]]
Pairs = tuple[tuple[str, Mapping[str, Any]], ...]
ProviderOptions = Mapping[str, Any] | Sequence[Mapping[str, Any]]

_V1_FOLDERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")  # mount points of version 1 control groups


def runtime_of(
    providers: Providers | None,
    provider_options: ProviderOptions | None,
    session_options: onnxruntime.SessionOptions | Mapping[str, Any] | None,
    threads: int | None,
) -> Runtime:
    """Check the options and return how ONNX Runtime runs a model."""
    if isinstance(session_options, onnxruntime.SessionOptions):
        return _with_session_options(providers, provider_options, session_options, threads)
    if not (session_options is None or isinstance(session_options, Mapping)):
        raise ServingError(
            "session_options must be an onnxruntime.SessionOptions or a dict of its fields, but got "
            f"{session_options!r:.80}"
        )
    fields = dict(session_options or {})
    if threads is not None and "intra_op_num_threads" in fields:
        raise ServingError("threads and session_options['intra_op_num_threads'] are the same; give one of them")
    own = fields.pop("intra_op_num_threads", None) or None  # 0 leaves it to the runtime
    given = own if threads is None else threads
    count = _threads(given)
    options = quiet_options(count)
    for name, value in fields.items():
        _set_field(options, name, value)
    chosen = _providers(providers, provider_options)
    return _runtime(chosen, options, count, threads_are_given=given is not None)


def _runtime(chosen: Pairs, options: onnxruntime.SessionOptions, threads: int, *, threads_are_given: bool) -> Runtime:
    """Put plug-in providers into the session options; otherwise keep providers beside the options."""
    if [name for name, _ in chosen] == [CPU]:
        return Runtime(chosen, options, threads=threads)
    from gralora_fx.run.sessions.placement import complete_options, is_openvino, record_placement
    from gralora_fx.run.sessions.plugins import choose_device, devices_of

    record_placement(options)
    plugins = {name: its_devices for name, _ in chosen if name != CPU and (its_devices := devices_of(name))}
    if not plugins:
        return Runtime(chosen, options, threads=threads)
    devices: list[Device] = []
    final: list[tuple[str, Mapping[str, Any]]] = []
    for name, own in chosen:
        device, values = None, dict(own)
        if name in plugins:
            device = choose_device(plugins[name], values.pop("device_type", None))
            devices.append(device)
            if is_openvino(name):
                values = complete_options(values, device, threads, threads_are_given=threads_are_given)
        final.append((name, values))
        texts = {key: _as_text(name, key, value) for key, value in values.items()}
        try:
            if device is None:
                options.add_provider(name, texts)
            else:
                options.add_provider_for_devices([device.handle], texts)
        except Exception as error:  # ONNX Runtime raises types of its own, without a common base
            raise ServingError(f"ONNX Runtime cannot add {device or name} ({first_line(error)})") from error
    return Runtime(tuple(final), options, tuple(devices), threads)


def _as_text(provider: str, name: str, value: object) -> str:
    """Return an option's value as text, which plug-ins require; objects as JSON."""
    if isinstance(value, (str, int, float)):
        return str(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ServingError(f"option {name} of {provider} must be a text or a number, but got {value!r:.80}") from error


def _with_session_options(
    providers: Providers | None,
    provider_options: ProviderOptions | None,
    options: onnxruntime.SessionOptions,
    threads: int | None,
) -> Runtime:
    """Use a user's session options unchanged."""
    if threads is not None:
        raise ServingError(
            "threads would change the given SessionOptions; set their intra_op_num_threads, or give a dict of fields"
        )
    has_providers = hasattr(options, "has_providers") and options.has_providers()
    if has_providers and not (providers is None and provider_options is None):
        raise ServingError("the SessionOptions hold providers themselves; leave out providers and provider_options")
    chosen = () if has_providers else _providers(providers, provider_options)
    if plugin := next((name for name, _ in chosen if name != CPU and _devices_of(name)), None):
        raise ServingError(
            f"{plugin} would change the given SessionOptions; give a dict of fields, or add its devices to them"
        )
    return Runtime(chosen, options, threads=options.intra_op_num_threads or available_threads())


def _threads(value: object) -> int:
    if value is None:
        return available_threads()
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= 1024:
        raise ServingError(f"{option('threads')} must be a whole number from 1 to 1024, but got {value!r:.80}")
    return int(value)


def _set_field(options: onnxruntime.SessionOptions, name: object, value: object) -> None:
    known = [key for key, kind in vars(onnxruntime.SessionOptions).items() if isinstance(kind, property)]
    if name not in known:
        raise ServingError(f"unknown session option {name!r:.80}; there are {', '.join(sorted(known))}")
    try:
        setattr(options, str(name), value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = type(getattr(options, str(name))).__name__
        raise ServingError(f"session option {name!r} is of type {kind}, but got {value!r:.80}") from error


def _providers(providers: Providers | None, provider_options: ProviderOptions | None) -> Pairs:
    """Return providers with their options, by name."""
    if providers is None:
        if provider_options is not None:
            raise ServingError("provider_options need providers; name those that they are for")
        return ((CPU, {}),)
    pairs = _as_pairs([providers] if isinstance(providers, (str, tuple)) and _is_one(providers) else providers)
    names = [name for name, _ in pairs]
    if provider_options is not None:
        options = [provider_options] if isinstance(provider_options, Mapping) else provider_options
        if not isinstance(options, Sequence) or len(options) != len(pairs):
            raise ServingError(f"provider_options must be a dict for each of {', '.join(names)}, in their order")
        if any(own_options is not None for _, own_options in pairs):
            raise ServingError("a provider's options are given in its tuple and in provider_options; give them once")
        pairs = list(zip(names, options, strict=True))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ServingError(f"execution provider {twice} is named twice; name it once")
    for name in names:
        if name != CPU:
            _devices_of(name)  # raises if it is not installed
    return tuple((name, _provider_options(name, options)) for name, options in pairs)


def _devices_of(provider: str) -> tuple[Device, ...]:
    """Return a plug-in provider's devices; none for a built-in provider."""
    from gralora_fx.run.sessions.plugins import devices_of

    return devices_of(provider)


def _is_one(providers: str | tuple[Any, ...]) -> bool:
    """Return whether `providers` is a single one: a name, or a name and its options."""
    return isinstance(providers, str) or (len(providers) == 2 and isinstance(providers[1], Mapping))


def _as_pairs(providers: Any) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for provider in providers if isinstance(providers, Sequence) else [providers]:
        name, options = provider if isinstance(provider, tuple) and len(provider) == 2 else (provider, None)
        if not isinstance(name, str):
            raise ServingError(
                f"a provider is a name, or a name and a dict of options as a tuple, but got {provider!r:.80}"
            )
        pairs.append((name, options))
    if not pairs:
        raise ServingError("providers are empty; name one, or leave them out for the CPU")
    return pairs


def _provider_options(name: str, options: Any) -> Mapping[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ServingError(f"options of {name} must be a dict by name, but got {options!r:.80}")
    other = next((key for key in options if key.endswith("ExecutionProvider") and key != name), None)
    if other is not None:
        raise ServingError(f"options for {other} are given, but it is not among the providers; name it there too")
    if name == CPU and options:
        warn_caller(f"{', '.join(options)} has no effect: {CPU} has no options; give session_options for the session's")
    return dict(options)


def available_threads(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use, by its affinity and its control group's quota.

    A quota of two and a half cores counts as two, and one below a core as one: with more threads than cores in the
    quota, all would be stopped each time it is used up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores allowed by each control group around this process; none without control groups."""
    groups, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    if not groups.is_file():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _quotas_within(mount, path, ("cpu.max",))
        elif "cpu" in controllers.split(","):
            for name in _V1_FOLDERS:
                yield from _quotas_within(mount / name, path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def _quotas_within(mount: Path, path: str, names: tuple[str, ...]) -> Iterator[float]:
    """Yield the quotas of a group and its parents; in a container its own group may be the mount itself."""
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount) and all((folder / name).is_file() for name in names):
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
