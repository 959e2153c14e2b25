"""The server: any checkpoint and compute policy behind a websocket protocol.

A client connects and exchanges messages in the protocol that its observation keys name (``openpi``, ``vla_eval``). An invalid
request is answered by one sentence, without a traceback, and the connection stays open. Plain HTTP on the same port:
``/healthz`` and ``/metrics``. Web pages are refused: a browser states the origin of the page, and cannot send a token in a
header.

Connections do not affect each other: all state of a connection is in its ``conversation.Conversation``.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from http import HTTPStatus
from typing import Any, TypeVar

import numpy as np
import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from vlaflow import __version__
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.sampler_choice import CalibrationEpisodes
from vlaflow.config import to_json
from vlaflow.errors import BusyError, CapabilityError, ConfigError, VlaflowError
from vlaflow.policies.action_prefix import longest_action_prefix
from vlaflow.policies.base import Policy
from vlaflow.serving.conversation import Conversation
from vlaflow.serving.dashboard import LOOPBACK, MOST_PAGE_BYTES, PAGE, STREAM, SUBPROTOCOL, Dashboard, named_here, same_origin
from vlaflow.serving.engine import Engine, EngineConfig
from vlaflow.serving.limits import most_message_bytes, most_pixels
from vlaflow.serving.listener import AT_ONCE, Listener, log_pauses
from vlaflow.serving.observation_keys import ObservationKeys, read
from vlaflow.serving.places import ClientPlaces
from vlaflow.serving.request_log import OneLine, RequestLog
from vlaflow.serving.turns import PER_CONNECTION_S, PER_MESSAGE_S, LimitedConnection, Turns, WorkingClock
from vlaflow.spec import Observation

logger = logging.getLogger("vlaflow.serving")
T = TypeVar("T")
_ONE_LINE = OneLine()
_CLOSE_S = 2.0
_FRAMES_AHEAD = 1
"""Requests that are read ahead while one is processed; more remain in the socket. The websocket library stops reading when
there is one more than its ``max_queue``."""


@dataclass(frozen=True)
class ServerConfig:
    """Where and how to serve.

    Args:
        observation_keys, views: see ``observation_keys.choose``.
        host, port: address to listen on; other than loopback needs a ``token``. Port 0 selects a free one.
        token: clients send it as "Authorization: Api-Key TOKEN".
        engine: how requests are batched.
        most_bytes: largest request; None for what the policy's images need at most (``limits``).
        connections: largest number of clients; more are turned away.
        open_s: longest wait for the headers of a client.
        idle_s: longest time without a reply to pings before a connection is closed, and how long a client that sends no
            request keeps its place when a new client needs it.
        n_action_steps: actions of a chunk that clients execute; None for the checkpoint's default.
        budget: the compute policy for a budget in milliseconds, for requests with a "budget_ms".
        dashboard: whether to serve the operator's page.
        warm_up: number of chunks computed before the first client is accepted; 0 for none.
        checkpoint, fingerprint: checkpoint of the policy and its content hash, for the metadata.
        calibrated_on: episodes that its sampler was chosen on, for the metadata: success is not measured on them.
    """

    observation_keys: ObservationKeys
    views: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    most_bytes: int | None = None
    connections: int = 32
    open_s: float = 10.0
    idle_s: float = 60.0
    n_action_steps: int | None = None
    budget: Callable[[float], ComputePolicy] | None = None
    dashboard: bool = False
    warm_up: int = 3
    checkpoint: str = ""
    fingerprint: str = ""
    calibrated_on: CalibrationEpisodes | None = None

    def __post_init__(self) -> None:
        if self.token is not None and not self.token.strip():
            raise ConfigError("The token is empty, which no client can send; set a token, or none to serve this machine alone.")
        most_bytes = 1 if self.most_bytes is None else self.most_bytes
        if not 0 <= self.port < 2**16 or min(self.connections, most_bytes, self.warm_up + 1) < 1:
            raise ConfigError(
                "port must lie in 0..65535, connections and most_bytes must be at least 1, and warm_up at least 0."
            )
        if self.host not in LOOPBACK and not self.token:
            raise ConfigError(
                f"Serving on {self.host} lets other machines move the robot; give a --token, or serve on 127.0.0.1 and tunnel."
            )


@dataclass
class PolicyServer:
    """Serves a policy; see the module docstring.

    >>> server = PolicyServer(policy, Dense(), ServerConfig(**choose("metaworld", ("corner2",))))
    >>> asyncio.run(server.serve())
    """

    policy: Policy
    compute: ComputePolicy
    config: ServerConfig

    def __post_init__(self) -> None:
        self.compute.needs.check(self.policy.model, self.compute.name, self.policy.folder)
        chunk_size = self.policy.chunk_size
        stated = self.config.n_action_steps
        self.n_action_steps = self.policy.n_action_steps if stated is None else stated
        if not 1 <= self.n_action_steps <= chunk_size:
            raise ConfigError(
                f"The checkpoint makes chunks of {chunk_size} actions, so 1 to {chunk_size} can be executed, not "
                f"{self.n_action_steps}."
            )
        self.compute = self.compute.executing(self.n_action_steps)
        self.engine, self.request_log = Engine(self.policy, self.config.engine), RequestLog()
        self.dashboard = self._dashboard() if self.config.dashboard else None
        self.most_image_bytes = 3 * sum(map(most_pixels, self.policy.views.values()))
        self.most_bytes = self.config.most_bytes or most_message_bytes(self.policy.views)
        self._idle_s = max(self.config.idle_s, self.config.observation_keys.protocol.idle_s)
        self._places = ClientPlaces(self.config.connections, self.config.open_s, self._idle_s)
        self._stop, self._idle, self._answering = asyncio.Event(), asyncio.Event(), 0
        self._idle.set()

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The first message to a client."""
        policy = self.policy
        return {
            "server": f"vlaflow {__version__}",
            "system": policy.config.system,
            "compute": self.compute.name,
            "compute_settings": repr(self.compute),
            "guided": self.config.engine.guided,
            "checkpoint": self.config.checkpoint,
            "fingerprint": self.config.fingerprint,
            "calibrated_on": to_json(self.config.calibrated_on),
            "dtype": policy.dtype,
            "engine": policy.model.engine,
            "action_spec": to_json(policy.action_spec),
            "chunk_size": policy.chunk_size,
            "n_action_steps": self.n_action_steps,
            "max_action_prefix": longest_action_prefix(policy),
            "views": list(self.config.views),
            "rate_hz": policy.action_spec.rate_hz,
            "chunk_seconds": policy.chunk_size / policy.action_spec.rate_hz,
            "robot": policy.robot or policy.action_spec.robot,
            "images": dict(zip(self.config.observation_keys.images, self.policy.views.values(), strict=True)),
            "state": list(self.config.observation_keys.state),
            "prompt": self.config.observation_keys.prompt,
            "default_prompt": self.config.observation_keys.default_prompt,
            "state_dim": len(policy.stats["state"].mean),
        }

    def _dashboard(self) -> Dashboard:
        policy, spec = self.policy, self.policy.action_spec
        hello = {
            "system": policy.config.system,
            "compute": self.compute.name,
            "robot": spec.robot,
            "dimensions": [to_json(dimension) for dimension in spec.dimensions],
            "n_action_steps": self.n_action_steps,
            "rate_hz": spec.rate_hz,
            "depth": policy.model.backbone.spec.depth,
        }
        page = Dashboard(self.request_log, self.engine, hello, self.config.token)
        self.request_log.observer = page.record
        return page

    async def serve(self, ready: asyncio.Future[int] | None = None) -> None:
        """Warm up, serve until ``stop``, then finish open requests.

        Args:
            ready: set to the port once requests are accepted.

        Raises:
            OSError: the address is unknown or in use.
        """
        # an address that cannot be used is known before the first chunk
        listener = Listener(self.config.host, self.config.port)
        worker = asyncio.create_task(self.engine.run())
        quiet = logging.getLogger("vlaflow.serving.websockets")
        quiet.addFilter(_ONE_LINE)
        try:
            if not await self._warmed_up():
                return
            log_pauses(asyncio.get_running_loop())
            server = await serve(
                self._connection,
                sock=listener,
                process_request=self._http,
                select_subprotocol=lambda _, offered: SUBPROTOCOL if SUBPROTOCOL in offered else None,
                compression=None,
                max_size=self.most_bytes,
                max_queue=_FRAMES_AHEAD - 1,
                write_limit=0,
                open_timeout=self.config.open_s,
                ping_interval=min(20.0, self.config.idle_s),
                ping_timeout=self._idle_s,
                close_timeout=min(_CLOSE_S, self.config.idle_s),
                server_header=None,
                backlog=AT_ONCE,
                create_connection=partial(LimitedConnection, Turns(WorkingClock(lambda: self.engine.computing))),  # type: ignore[arg-type]
                logger=quiet,
            )
            port = _port(server)
            what, host = f"{self.policy.config.system} with {self.compute.name}", self.config.host
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self.request_log.write("serving", note=f"{what} on ws://{place}")
            if self.dashboard is not None:
                self.request_log.write("dashboard", note=f"http://{place}{PAGE}")
            if ready is not None:
                ready.set_result(port)
            await self._stop.wait()
            await self._finish(server)
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
            self.engine.close()
            listener.close()

    async def _warmed_up(self) -> bool:
        """Compute the first chunks; False if ``stop`` was called meanwhile."""
        if not self.config.warm_up:
            return True
        self.request_log.write("warming up", note=f"the first chunks of {self.compute.name} are slow")
        warming = asyncio.create_task(self.engine.warm_up(self.compute, self.config.warm_up))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((warming, stopped), return_when=asyncio.FIRST_COMPLETED)
        for task in (warming, stopped):
            task.cancel()
        if self._stop.is_set():
            await asyncio.gather(warming, return_exceptions=True)
            return False
        await warming
        return True

    async def _finish(self, server: Server) -> None:
        """Finish open requests, then close; clients that keep their connection open are not waited for."""
        self.request_log.write("stopping", note="open requests are finished")
        server.close(close_connections=False)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.config.engine.deadline_ms / 1e3)
        await asyncio.gather(*(connection.close(1001) for connection in list(server.connections)))
        with suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), _CLOSE_S)

    def stop(self) -> None:
        """Accept no new connections and end ``serve``."""
        self._stop.set()

    # -- connections -------------------------------------------------------------------------------------------------

    async def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and refuse clients that may not connect."""
        assert isinstance(connection, LimitedConnection)
        connection.opened()
        connection.spend(PER_CONNECTION_S)
        await connection.turn()
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self.dashboard is not None and (page := self.dashboard.http(request)):
            return page
        if request.path == STREAM:
            why = self.dashboard.refusal(request) if self.dashboard is not None else "Serve with --dashboard to watch."
            connection.protocol.max_message_size = MOST_PAGE_BYTES
            return None if why is None else self._turn_away(connection, HTTPStatus.FORBIDDEN, why)
        if self.config.token is not None:
            sent = request.headers.get_all("Authorization")
            if not hmac.compare_digest(" ".join(sent).encode(errors="replace"), f"Api-Key {self.config.token}".encode()):
                return self._turn_away(connection, HTTPStatus.UNAUTHORIZED, "Send 'Authorization: Api-Key TOKEN'.")
        if request.path == "/metrics":
            if self.config.token is None and not named_here(request):
                return self._turn_away(connection, HTTPStatus.FORBIDDEN, "Without a token, only this machine may read metrics.")
            return connection.respond(HTTPStatus.OK, self.request_log.exposition(self.engine))
        if (
            self.config.token is None
            and request.headers.get_all("Origin")
            and not (same_origin(request) and named_here(request))
        ):
            return self._turn_away(connection, HTTPStatus.FORBIDDEN, "Web pages may not connect to the policy.")
        if not self._places.make_room():
            return self._turn_away(connection, HTTPStatus.SERVICE_UNAVAILABLE, self._full)
        return None

    @property
    def _full(self) -> str:
        return f"{self.config.connections} clients are connected already, which is the limit; try again later."

    def _turn_away(self, connection: ServerConnection, status: HTTPStatus, why: str) -> Response:
        self.request_log.turned_away(_name(connection), why)
        return connection.respond(status, f"{why}\n")

    async def _connection(self, connection: ServerConnection) -> None:
        assert isinstance(connection, LimitedConnection)
        name = _name(connection)
        if self.dashboard is not None and connection.request is not None and connection.request.path == STREAM:
            await self.dashboard.watch(connection, name)
            return
        if not self._places.make_room():  # several connected at once
            self.request_log.turned_away(name, self._full)
            await connection.close(1013, self._full)
            return
        with self._places.taken(connection), self.request_log.connected(name), suppress(websockets.ConnectionClosed):
            conversation = self.config.observation_keys.protocol.begin(self)
            conversation.spend = connection.spend
            if (greeting := conversation.greeting()) is not None:
                await connection.send(greeting)
            async for frame in connection:
                await connection.turn()
                connection.spend(PER_MESSAGE_S)
                conversation.cost = connection.cost
                with self._busy():
                    with self._places.busy(connection):
                        reply = await _while_there(connection, self._reply(frame, conversation, name))
                    if conversation.answered:
                        connection.establish()
                    if reply is not None:
                        await connection.send(reply)
                await asyncio.sleep(0)  # a client that sends several requests at once must not block the others

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._answering += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.set()

    async def _reply(self, frame: str | bytes, conversation: Conversation, name: str) -> str | bytes | None:
        """The frame to send, if any."""
        with self.request_log.request(name) as entry:
            try:
                if self._stop.is_set():
                    raise BusyError("The server is stopping.")
                return await conversation.answer(frame, entry)
            except VlaflowError as error:
                return conversation.refusal(entry.refused(error))
            except Exception:  # ours, so the log gets the traceback, and neither this client nor another is cut off
                entry.outcome = "failed"
                logger.exception("%s: a bug in the server", name)
                return conversation.refusal("The server failed on this request; see its log.")

    # -- called by conversations -------------------------------------------------------------------------------------

    def observe(self, request: Mapping[str, Any]) -> Observation:
        """Read the observation of a request; also in a thread.

        If the observation keys name no state, the policy gets the mean of its training data, which normalises to zeros.

        Raises:
            RequestError: a key is missing or has an invalid value.
        """
        observation = read(request, self.config.observation_keys, self.config.views, self.policy.views)
        if not self.config.observation_keys.state:
            return replace(observation, state=np.array(self.policy.stats["state"].mean, np.float32))
        return observation

    def instruct(self, observation: Observation, follows: bool) -> Observation:
        """The observation, with the operator's instruction if there is one and the request follows it."""
        return self.dashboard.instruct(observation, follows) if self.dashboard is not None else observation


async def _while_there(connection: ServerConnection, answering: Coroutine[Any, Any, T]) -> T:
    """The result of ``answering``, which is cancelled if the client disconnects first.

    Raises:
        websockets.ConnectionClosed: the client has left.
    """
    task, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(connection.wait_closed())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            raise connection.protocol.close_exc
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


def _name(connection: ServerConnection) -> str:
    """Address and port of a client, for the log."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else f"{address}"


def _port(server: Server) -> int:
    sockets = list(server.sockets)
    if not sockets:
        raise CapabilityError("The server has no socket.")
    return int(sockets[0].getsockname()[1])
