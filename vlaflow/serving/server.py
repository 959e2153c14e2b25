"""The server: openpi's websocket protocol for any checkpoint and compute policy.

A client connects and gets the metadata; then every request, a map in one binary frame, is answered by a map with "actions"
(chunk_size, D) in robot units. An invalid request is answered by a text frame with one sentence, without a traceback, and the
connection stays open. Plain HTTP on the same port: ``/healthz`` and ``/metrics``. Web pages are refused: a browser states the
origin of the page, and cannot send a token in a header.

Besides openpi's keys a request may contain "seed" (of this chunk's noise), "reset" (the noise sequence starts over; alone, the
reply is {"reset": true}), "action_prefix" and "inference_delay" (actions that the robot will have executed when the
reply arrives, with which the chunk begins), "budget_ms", "deadline_ms", "action_spec" (refused unless it is the policy's),
"follow_operator" (see ``dashboard``) and, from RoboArena's clients, "endpoint": "infer" or "reset". A reply also contains
"confidence" if there is a rater, "spread" if several draws were made, "layers", "nfe", "repaired" and the milliseconds by part.

Connections do not affect each other: the only state of a connection is its number of chunks, which seeds the next one's noise.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import numpy as np
import websockets
from torch import Generator
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from vlaflow import __version__
from vlaflow.compute.base import ComputePolicy
from vlaflow.config import from_json, to_json
from vlaflow.errors import BusyError, CapabilityError, ConfigError, RequestError, SpecError, VlaflowError
from vlaflow.policies.base import Policy
from vlaflow.robot import wire
from vlaflow.serving.dashboard import LOOPBACK, PAGE, STREAM, SUBPROTOCOL, Dashboard, named_here, same_origin
from vlaflow.serving.engine import ActRequest, Engine, EngineConfig
from vlaflow.serving.observation_keys import ObservationKeys, committed, read
from vlaflow.serving.request_log import OneLine, RequestEntry, RequestLog
from vlaflow.spec import ActionSpec, Chunk

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
        most_bytes: largest request.
        connections: largest number of clients; more are turned away.
        open_s: longest wait for the headers of a client.
        idle_s: longest time without a reply to pings before a connection is closed.
        budget: the compute policy for a budget in milliseconds, for requests with a "budget_ms".
        dashboard: whether to serve the operator's page.
        warm_up: number of chunks computed before the first client is accepted; 0 for none.
        checkpoint, fingerprint: checkpoint of the policy and its content hash, for the metadata.
    """

    observation_keys: ObservationKeys
    views: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    most_bytes: int = wire.MOST_BYTES
    connections: int = 32
    open_s: float = 10.0
    idle_s: float = 60.0
    budget: Callable[[float], ComputePolicy] | None = None
    dashboard: bool = False
    warm_up: int = 3
    checkpoint: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.token is not None and not self.token.strip():
            raise ConfigError("The token is empty, which no client can send; set a token, or none to serve this machine alone.")
        if not 0 <= self.port < 2**16 or min(self.connections, self.most_bytes, self.warm_up + 1) < 1:
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
        self.compute.needs.check(self.policy.model, self.compute.name)
        self.engine, self.request_log = Engine(self.policy, self.config.engine), RequestLog()
        self.dashboard = self._dashboard() if self.config.dashboard else None
        self._stop, self._idle, self._answering = asyncio.Event(), asyncio.Event(), 0
        self._idle.set()

    @property
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
            "action_spec": to_json(policy.action_spec),
            "chunk_size": policy.config.decoder.chunk_size,
            "n_action_steps": policy.config.n_action_steps,
            "max_action_prefix": policy.model.decoder.max_action_prefix,
            "views": list(self.config.views),
            "rate_hz": policy.action_spec.rate_hz,
            "images": dict(zip(self.config.observation_keys.images, self.policy.model.backbone.views.values(), strict=True)),
            "state": list(self.config.observation_keys.state),
            "state_dim": len(policy.stats["state"].mean),
        }

    def _dashboard(self) -> Dashboard:
        policy, spec = self.policy, self.policy.action_spec
        hello = {
            "system": policy.config.system,
            "compute": self.compute.name,
            "robot": spec.robot,
            "dimensions": [to_json(dimension) for dimension in spec.dimensions],
            "n_action_steps": policy.config.n_action_steps,
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
        """
        worker = asyncio.create_task(self.engine.run())
        quiet = logging.getLogger("vlaflow.serving.websockets")
        quiet.addFilter(_ONE_LINE)
        try:
            if not await self._warmed_up():
                return
            server = await serve(
                self._connection,
                self.config.host,
                self.config.port,
                process_request=self._http,
                select_subprotocol=lambda _, offered: SUBPROTOCOL if SUBPROTOCOL in offered else None,
                compression=None,
                max_size=self.config.most_bytes,
                max_queue=_FRAMES_AHEAD - 1,
                open_timeout=self.config.open_s,
                ping_interval=min(20.0, self.config.idle_s),
                ping_timeout=self.config.idle_s,
                close_timeout=min(_CLOSE_S, self.config.idle_s),
                server_header=None,
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

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and refuse clients that may not connect."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self.dashboard is not None and (page := self.dashboard.http(request)):
            return page
        if request.path == STREAM:
            why = self.dashboard.refusal(request) if self.dashboard is not None else "Serve with --dashboard to watch."
            return None if why is None else self._turn_away(connection, HTTPStatus.FORBIDDEN, why)
        if self.config.token is not None:
            sent = request.headers.get_all("Authorization")
            if not hmac.compare_digest(" ".join(sent).encode(errors="replace"), f"Api-Key {self.config.token}".encode()):
                return self._turn_away(connection, HTTPStatus.UNAUTHORIZED, "Send 'Authorization: Api-Key TOKEN'.")
        if request.path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.request_log.exposition(self.engine))
        if (
            self.config.token is None
            and request.headers.get_all("Origin")
            and not (same_origin(request) and named_here(request))
        ):
            return self._turn_away(connection, HTTPStatus.FORBIDDEN, "Web pages may not connect to the policy.")
        if len(self.request_log.clients) >= self.config.connections:
            return self._turn_away(connection, HTTPStatus.SERVICE_UNAVAILABLE, self._full)
        return None

    @property
    def _full(self) -> str:
        return f"{self.config.connections} clients are connected already, which is the limit; try again later."

    def _turn_away(self, connection: ServerConnection, status: HTTPStatus, why: str) -> Response:
        self.request_log.turned_away(_name(connection), why)
        return connection.respond(status, f"{why}\n")

    async def _connection(self, connection: ServerConnection) -> None:
        chunks, name = 0, _name(connection)
        if self.dashboard is not None and connection.request is not None and connection.request.path == STREAM:
            await self.dashboard.watch(connection, name)
            return
        if len(self.request_log.clients) >= self.config.connections:  # several connected at once
            self.request_log.turned_away(name, self._full)
            await connection.close(1013, self._full)
            return
        with self.request_log.connected(name), suppress(websockets.ConnectionClosed):
            await connection.send(wire.pack(self.config.observation_keys.protocol.hello(self.metadata)))
            async for frame in connection:
                with self._busy():
                    reply, chunks = await _while_there(connection, self._reply(frame, chunks, name))
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

    async def _reply(self, frame: str | bytes, chunks: int, name: str) -> tuple[str | bytes, int]:
        """The frame to send, and the connection's number of chunks so far."""
        with self.request_log.request(name) as entry:
            try:
                if self._stop.is_set():
                    raise BusyError("The server is stopping.")
                reply, chunks = await self._answer(frame, chunks, entry)
            except VlaflowError as error:
                return entry.refused(error), chunks
            except Exception:
                logger.exception("%s: a bug in the server", name)
                return "The server failed on this request; see its log.", chunks
            entry.outcome = "answered" if entry.chunk is not None else "reset"
            if isinstance(reply, str):
                return reply, chunks
            if "server_timing" in reply:
                reply["server_timing"]["total_ms"] = 1e3 * (time.perf_counter() - entry.began)
            return wire.pack(self._encoded(reply), entry.dialect), chunks

    def _encoded(self, reply: dict[str, Any]) -> Any:
        """The reply in the format of the client's protocol."""
        return (
            self.config.observation_keys.protocol.answer(reply, self.policy.config.n_action_steps)
            if "actions" in reply
            else reply
        )

    async def _answer(self, frame: str | bytes, chunks: int, entry: RequestEntry) -> tuple[dict[str, Any] | str, int]:
        if isinstance(frame, str):
            raise RequestError("Requests must be binary msgpack frames, got text.")
        request, entry.dialect = wire.unpack_as_sent(frame, self.config.most_bytes)
        if not isinstance(request, dict):
            raise RequestError(f"A request must be a map, got a {type(request).__name__}.")
        endpoint = request.pop("endpoint", None)
        if endpoint is not None and (not isinstance(endpoint, str) or endpoint not in ("infer", "reset")):
            raise RequestError(f"There is no endpoint {endpoint!r:.40}; there are 'infer' and 'reset'.")
        self._require_spec(request.pop("action_spec", None))
        if endpoint == "reset":
            return "reset successful", 0
        if _flag(request.pop("reset", False), "reset"):
            chunks = 0
            if not request:
                return {"reset": True}, 0
        seed, deadline_ms = _number(request.pop("seed", None), "seed"), _number(request.pop("deadline_ms", None), "deadline_ms")
        budget_ms, action_prefix = _number(request.pop("budget_ms", None), "budget_ms"), committed(request)
        compute = self.compute if budget_ms is None else self._within(budget_ms)
        follows = _flag(request.pop("follow_operator", False), "follow_operator")
        observation = read(request, self.config.observation_keys, self.config.views)
        if self.dashboard is not None:
            observation = self.dashboard.instruct(observation, follows)
        entry.observation = observation
        generator = Generator().manual_seed(int(seed) if seed is not None else chunks)
        began = time.perf_counter()
        try:
            act_request = ActRequest(observation, compute, generator, action_prefix)
            chunk = entry.chunk = await self.engine.ask(act_request, deadline_ms)
        except SpecError as error:
            raise RequestError(str(error)) from error
        extra = {"instruction": observation.instruction} if follows else {}
        return {**_reply(chunk, 1e3 * (time.perf_counter() - began)), **extra}, chunks + 1

    def _within(self, budget_ms: float) -> ComputePolicy:
        if self.config.budget is None:
            raise RequestError("This server has no latency profile for budget_ms; measure one: vlaflow bench latency CKPT")
        try:
            return self.config.budget(budget_ms)
        except VlaflowError as error:
            raise RequestError(str(error)) from error

    def _require_spec(self, stated: Any) -> None:
        if stated is None:
            return
        if not isinstance(stated, Mapping):
            raise RequestError("'action_spec' must be a map, as in the server's metadata.")
        theirs = from_json(ActionSpec, _plain(stated), "the request's action_spec")
        self.policy.action_spec.require_match(theirs, "the server's policy", "the client")


def _reply(chunk: Chunk, infer_ms: float) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "actions": chunk.actions,
        "server_timing": {"infer_ms": infer_ms},
        "policy_timing": {"infer_ms": chunk.milliseconds.get("total", 0.0), **chunk.milliseconds},
        "layers": chunk.layers,
        "nfe": chunk.nfe,
        "repaired": chunk.repaired,
    }
    if chunk.confidence is not None:
        reply["confidence"] = chunk.confidence.astype(np.float32)
    if chunk.spread is not None:
        reply["spread"] = chunk.spread.astype(np.float32)
    return reply


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


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise RequestError(f"'{name}' must be a number ≥ 0 and below 2⁶³.")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"'{name}' must be true or false.")
    return bool(value)


def _name(connection: ServerConnection) -> str:
    """Address and port of a client, for the log."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else f"{address}"


def _plain(value: Any) -> Any:
    """Convert to plain maps with text keys, as from JSON."""
    try:
        return json.loads(json.dumps(value))  # with Python's infinities: a range may be infinite
    except (TypeError, ValueError) as error:
        raise RequestError("'action_spec' must consist of texts, numbers, lists and maps.") from error


def _port(server: Server) -> int:
    sockets = list(server.sockets)
    if not sockets:
        raise CapabilityError("The server has no socket.")
    return int(sockets[0].getsockname()[1])
