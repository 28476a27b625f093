"""`gralora-fx serve`: an export directory as an HTTP service."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import typer

from gralora_fx.base.compat.packages import require_extra
from gralora_fx.base.features import parts
from gralora_fx.base.progress.console import CommandProgress
from gralora_fx.base.progress.stages import timed
from gralora_fx.cli.huge_pages import use_huge_pages
from gralora_fx.cli.options import Directory, OnnxToRun
from gralora_fx.cli.values import Declared, export_directory, read_adapters, takes, text_option
from gralora_fx.core.config.option import declared_options
from gralora_fx.core.config.service_settings import ConnectionLimits, ServiceSettings, warn_of_missing_spans
from gralora_fx.errors import ConfigError, ServingError, shown
from gralora_fx.format.manifest import read_manifest

_ENGINES = ("uvicorn", "ray")
_MORE: list[Any] = parts("serve options")
_REPLICAS, _LIMITS = 2, ConnectionLimits()

Adapters = Annotated[
    list[str] | None,
    text_option(
        "--adapter",
        metavar="NAME=PATH",
        help="Serve this adapter too, an .onnx_adapter file or a directory that PEFT saved; may be repeated.",
    ),
]
Host = Annotated[str, text_option(metavar="HOST", help="Listen on this address.")]
Port = Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Listen on this port; 0 takes a free one.")]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help=f"Serve at most this many connections; others get status 503.  [default: {_LIMITS.connections}]",
    ),
]
ReadTimeout = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        metavar="SECONDS",
        help=f"Wait at most this long for a request to arrive whole.  [default: {_LIMITS.read_timeout:g}]",
    ),
]
AccessLog = Annotated[
    bool,
    typer.Option(
        "--access-log",
        help="Log each request on stdout: client, time, path, status, bytes and seconds, but no prompts and no keys.",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(_ENGINES)}]",
        help="Serve from this process (uvicorn), or from several that Ray Serve starts (ray).",
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help=f"Start this many processes with the model, for --engine ray.  [default: {_REPLICAS}]"
    ),
]


@takes(ServiceSettings, *_MORE)
def serve(
    onnx: OnnxToRun = None,
    directory: Directory = None,
    adapter: Adapters = None,
    adapter_root: Declared = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    *,
    max_connections: MaxConnections = None,
    read_timeout: ReadTimeout = None,
    access_log: AccessLog = False,
    engine: Engine = "uvicorn",
    replicas: Replicas = None,
    **options: Any,
) -> None:
    """Serve an export over HTTP, as OpenAI's API does.

    Texts are answered by OpenAI's protocol, tensors by the Open Inference Protocol. A request chooses its adapter by
    the name of its model. The page at / of the service is for trying it.
    """
    path = export_directory(onnx, directory)
    options |= {"adapters": read_adapters(adapter), "adapter_root": adapter_root}
    given: dict[str, Any] = {
        name: value if type(value) is not list else (*value,) for name, value in options.items() if value is not None
    }
    names = [{each.name for each in declared_options(kind)} & given.keys() for kind in _MORE]
    more = tuple(kind(**{name: given.pop(name) for name in own}) for kind, own in zip(_MORE, names, strict=True))
    settings = ServiceSettings(path, more=more, **given)
    if engine not in _ENGINES:
        raise ConfigError(f"--engine is {' or '.join(_ENGINES)}, but got {shown(engine)}")
    require_extra("serve", "serve", ServingError)
    warn_of_missing_spans()
    if engine == "ray":
        require_extra("scale", "--engine ray", ServingError)
    else:
        _check_idle("has no effect without --engine ray", {"--replicas": replicas})
    read_manifest(path, ServingError)  # before anything slow is imported
    use_huge_pages()  # now, since the restarted program repeats what was imported
    if engine == "ray":
        _check_idle(
            "has no effect with --engine ray, whose proxy takes the connections",
            {"--max-connections": max_connections, "--read-timeout": read_timeout},
        )
        _serve_replicas(settings, replicas or _REPLICAS, host, port, has_access_log=access_log)
        return
    with ExitStack() as stack:
        with CommandProgress(), _no_collections():
            with timed("importing"):
                from gralora_fx.service.app import create_app
                from gralora_fx.service.server import bind, run
            sockets = [stack.enter_context(bound) for bound in bind(host, port)]
            with timed("opening"):
                app = create_app(settings)
        limits = ConnectionLimits(max_connections or _LIMITS.connections, read_timeout or _LIMITS.read_timeout)
        run(app, sockets, limits, sys.stdout if access_log else None)


def _check_idle(reason: str, options: Mapping[str, object]) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{given[0]} {reason}; leave it out")


@contextmanager
def _no_collections() -> Iterator[None]:
    """Disable garbage collection while the service is created, and freeze what exists then.

    Collections take an eighth of the import time, and later ones would delay all requests for 0.2 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _serve_replicas(settings: ServiceSettings, replicas: int, host: str, port: int, *, has_access_log: bool) -> None:
    with ExitStack() as stack:
        with CommandProgress():
            with timed("importing"):
                from gralora_fx.service.scale import prepare

                prepare()
                from gralora_fx.service.adapter_store.store import converted
                from gralora_fx.service.scale.ray_service import check, run_replicas
            with timed("opening"):
                settings = stack.enter_context(converted(settings))
                adapters, at_a_time = check(settings)
        run_replicas(
            settings, adapters, at_a_time, replicas=replicas, host=host, port=port, has_access_log=has_access_log
        )
