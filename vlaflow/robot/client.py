"""A client of openpi's protocol. Needs numpy, msgpack and websockets, and neither torch nor a checkpoint.

>>> with Client("ws://127.0.0.1:8000") as client:
...     reply = client.infer({"observation/image": image, "observation/state": state, "prompt": "Open a drawer"})
>>> reply["actions"].shape  # (chunk_size, D), robot units
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.proxies import proxy_of, without_password

logger = logging.getLogger("vlaflow.robot")
_CLOSE_S = 2.0
"""Longest wait for the closing handshake, in seconds."""


class Client:
    """One connection, with one request at a time. It reconnects automatically after a restart of the server.

    After a restart, a server with another action spec, another chunk size, or a policy that accepts a shorter action prefix is
    refused, because the caller was set up for the first one.

    Args:
        address: "ws://HOST:PORT". An address of this machine is connected to directly, any other through the proxy of the
            environment (http_proxy, no_proxy, ...), if there is one.
        token: sent as "Authorization: Api-Key TOKEN".
        timeout_s: longest wait for a connection or an answer.

    Attributes:
        metadata: the map that the server sends on connection.
        reconnected: how often the connection had to be re-established.
    """

    metadata: dict[str, Any]

    def __init__(self, address: str, token: str | None = None, timeout_s: float = 30.0) -> None:
        self.address, self.token, self.timeout_s, self.reconnected = address, token, timeout_s, 0
        self._open = ExitStack()
        self._connection, self.metadata = self._connect()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Request a chunk.

        Args:
            observation: images, state and prompt with the observation keys of the server; optionally "seed", "reset",
                "deadline_ms", "action_spec", "action_prefix" and "inference_delay", "budget_ms".

        Raises:
            RequestError: the server refuses the request, cannot be reached, or was restarted with other actions.
        """
        message = wire.pack(dict(observation))
        try:
            return self._exchange(message)
        except ConnectionClosed:
            self._reconnect()
        try:
            return self._exchange(message)
        except ConnectionClosed as error:
            raise RequestError(f"{self.address} closed the connection twice during this request: {error}.") from error

    def reset(self) -> None:
        """Start an episode: the noise sequence starts over."""
        self.infer({"reset": True})

    def close(self) -> None:
        """Close the connection."""
        self._open.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _exchange(self, message: bytes) -> dict[str, Any]:
        self._connection.send(message)
        try:
            reply = self._connection.recv(self.timeout_s)
        except TimeoutError as error:
            self._open.close()  # a late reply must not be taken for that to the next request
            raise RequestError(f"{self.address} did not answer within {self.timeout_s:g} s.") from error
        if isinstance(reply, str):
            raise RequestError(reply)
        return wire.unpack(reply)

    def _reconnect(self) -> None:
        self._connection, metadata = self._connect()
        changed = [part for part in ("action_spec", "chunk_size") if metadata.get(part) != self.metadata.get(part)]
        if metadata.get("max_action_prefix", 0) < self.metadata.get("max_action_prefix", 0):
            changed.append("max_action_prefix")
        if changed:
            self._open.close()
            raise RequestError(
                f"{self.address} was restarted with another {changed[0].replace('_', ' ')} than this client was created with; "
                "create a new client, or start the server with the previous checkpoint."
            )
        self.metadata, self.reconnected = metadata, self.reconnected + 1
        logger.warning("connection to %s was lost; reconnected to %s", self.address, metadata.get("server", "another server"))

    def _connect(self) -> tuple[ClientConnection, dict[str, Any]]:
        headers = {"Authorization": f"Api-Key {self.token}"} if self.token else {}
        self._open.close()
        proxy = proxy_of(self.address)
        with ExitStack() as opening:
            try:
                connection = opening.enter_context(
                    connect(
                        self.address,
                        additional_headers=headers,
                        compression=None,
                        proxy=proxy,
                        max_size=wire.MOST_BYTES,
                        open_timeout=self.timeout_s,
                        close_timeout=min(_CLOSE_S, self.timeout_s),
                    )
                )
                _give_up_after(connection.socket, self.timeout_s)
                first = connection.recv(self.timeout_s)
            except InvalidStatus as error:
                reason = error.response.body.decode(errors="replace").strip() or f"HTTP status {error.response.status_code}"
                raise RequestError(f"{self.address} refuses this client: {reason:.200}") from error
            except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError, ImportError) as error:
                through = f" through the proxy {without_password(proxy)} of the environment" if proxy else ""
                cure = "Start the server: vlaflow serve CKPT"
                if proxy:
                    cure += "; to connect without the proxy, add the host to the environment variable no_proxy"
                raise RequestError(f"{self.address} cannot be reached{through}: {error}. {cure}") from error
            if isinstance(first, str):
                raise RequestError(f"{self.address} sent text instead of its metadata: {first:.200}")
            metadata = wire.unpack(first)
            if not isinstance(metadata, dict):
                raise RequestError(f"{self.address} sent a {type(metadata).__name__} instead of its metadata.")
            self._open = opening.pop_all()
        return connection, metadata


def _give_up_after(connection: socket.socket, seconds: float) -> None:
    """Close the connection if sent data is not acknowledged for this long, so that a cut cable is noticed while sending too."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        with suppress(OSError):  # already closed: the reader gets the error
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1e3 * seconds)))
