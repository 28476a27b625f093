"""The service under Ray Serve, which routes, queues, restarts and drains."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import ray
from prometheus_client import Metric
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.types import Message

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import GraloraError, ServingError, first_line
from gralora_fx.run.sessions.run_options import available_threads
from gralora_fx.service.adapter_store.store import load_given
from gralora_fx.service.app import create_app
from gralora_fx.service.engines import EncoderEngine, open_engine
from gralora_fx.service.metrics import Metrics
from gralora_fx.service.scale.frontend import APPLICATION, MODEL, Frontend
from gralora_fx.service.scale.spread_adapters import AsgiRequest, ReplicaAdapters, answer
from gralora_fx.service.server import run_torch_alone

_FRONTEND = "gralora-fx"
_OBJECT_STORE = 128 * 2**20  # bytes; requests and answers of some size pass through it
_DRAIN = 60.0  # seconds for running requests to finish at a shutdown
_CONNECTIONS = 4096  # requests that the frontend holds; those that wait for a replica are bounded by max_queue


class ModelReplica:
    """A process with the model and all adapters, which answers requests with the app of `create_app`."""

    async def __init__(self, settings: ServiceSettings, folder: Path) -> None:  # type: ignore[misc]  # Ray awaits it
        """Open the model; Ray routes requests here once it is warm."""
        self._app = create_app(settings)
        run_torch_alone()
        self._models = self._app.state.engine.models
        self._adapters = None if settings.adapter_root is None else ReplicaAdapters(self._models, folder)
        if self._adapters is not None:
            await self._adapters.follow()
        self._lifespan = AsyncExitStack()
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))

    async def change(self, step: str, *arguments: object) -> GraloraError | None:
        """Run a step of an adapter change, a method of `ReplicaAdapters`; return its error, if any."""
        problem: GraloraError | None = await getattr(self._adapters, step)(*arguments)
        return problem

    async def measured(self) -> list[Metric]:
        """Return the gauges of this process."""
        return list(self._app.state.metrics.now.collect())

    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def adapter(self, name: str) -> str:
        """Tell Ray that this replica has run an adapter, so that Ray prefers it for that adapter."""
        return name

    async def answer(self, request: AsgiRequest) -> AsyncIterator[Message]:
        """Yield the ASGI messages that answer a request."""
        if self._adapters is not None:
            await self._adapters.follow()
        name = serve.get_multiplexed_model_id()
        if name and self._models.knows(name):
            await self.adapter(name)
        async for message in answer(self._app, request):
            yield message

    async def __del__(self) -> None:
        """Stop after the requests in progress."""
        await self._lifespan.aclose()


def check(settings: ServiceSettings) -> tuple[tuple[str, ...], int]:
    """Open the export once, so that an error is one line, as without Ray."""
    engine = open_engine(settings, Metrics())
    with closing(engine.models):
        load_given(engine.models, settings)
    at_a_time = 2 * settings.rows if isinstance(engine, EncoderEngine) else settings.decoder_rows
    # some only wait for adapters to load
    return engine.models.adapters, at_a_time if settings.adapter_root is None else 2 * at_a_time


def run_replicas(
    settings: ServiceSettings,
    adapters: tuple[str, ...],
    at_a_time: int,
    *,
    replicas: int,
    host: str,
    port: int,
    has_access_log: bool = False,
) -> NoReturn:
    """Serve until the process is told to end; running requests are then answered, new ones refused."""
    port = _free_port(host, port)
    settings = _settled(settings, replicas)
    with tempfile.TemporaryDirectory(prefix="gralora-fx-replicas-") as place, _ray(settings, replicas) as logs:
        metrics, loads = Path(place, "metrics"), Path(place, "adapters")
        for folder in (metrics, loads):
            folder.mkdir()
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            logging_config=LoggingConfig(log_level="WARNING"),
        )
        model, frontend = _deployments(settings, replicas, at_a_time, metrics)
        try:
            try:
                behind = replace(settings, allow_origin=())  # browsers talk to the frontend
                handle = serve.run(model.bind(behind, loads), name=APPLICATION, route_prefix=None)
                access_log = Path(logs, "access.log") if has_access_log else None
                serve.run(frontend.bind(handle, settings, adapters, metrics, access_log, loads), name=_FRONTEND)
            except RuntimeError as error:
                raise ServingError(
                    f"the replicas do not start ({first_line(error)}); the logs in {logs} say why"
                ) from error
            each = f"{settings.threads} thread{'s' if settings.threads != 1 else ''} each"
            requests = "" if access_log is None else f", those of requests in {access_log.name}"
            print(
                f"{replicas} replicas with {each} are running on http://{host}:{port}; logs are in {logs}{requests}",
                file=sys.stderr,
                flush=True,
            )
            while True:
                signal.pause()
        finally:
            for name in (_FRONTEND, APPLICATION):  # in this order: what waits in the frontend is still answered
                serve.delete(name)


def _settled(settings: ServiceSettings, replicas: int) -> ServiceSettings:
    """Return the settings with absolute paths, and each replica's share of the cores."""
    adapters = {name: path.absolute() for name, path in settings.adapters.items()}
    threads = settings.threads or max(1, available_threads() // replicas)
    root = None if settings.adapter_root is None else settings.adapter_root.absolute()
    directory = settings.directory.absolute()
    return replace(settings, directory=directory, adapters=adapters, adapter_root=root, threads=threads)


def _deployments(
    settings: ServiceSettings, replicas: int, at_a_time: int, metrics: Path
) -> tuple[serve.Deployment, serve.Deployment]:
    """Return Ray's deployments of the model and the frontend."""
    environment = {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}}
    model = serve.deployment(
        name=MODEL,
        num_replicas=replicas,
        max_ongoing_requests=at_a_time,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_DRAIN,
        ray_actor_options={"num_cpus": settings.threads, "runtime_env": environment},
    )(ModelReplica)
    frontend = serve.deployment(
        name="frontend",
        max_ongoing_requests=_CONNECTIONS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_DRAIN,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
    )(serve.ingress()(Frontend))
    return model, frontend


@contextmanager
def _ray(settings: ServiceSettings, replicas: int) -> Iterator[str]:
    """Run Ray on this machine only, until the block ends; signals that end this process raise `SystemExit`."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        context = _started(replicas * (settings.threads or 1))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        yield f"{context.address_info['session_dir']}/logs/serve"
    finally:
        ray.shutdown()


def _started(threads: int) -> Any:
    """Start Ray and return its context."""
    try:
        return ray.init(
            address="local",
            num_cpus=max(available_threads(), threads),
            object_store_memory=_OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray has no type of its own for it
        raise ServingError(
            f"Ray does not start ({first_line(error)}); the machine may be too busy, try again"
        ) from error


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}:{port} ({error.strerror}); give another --port or --host"
        ) from error
