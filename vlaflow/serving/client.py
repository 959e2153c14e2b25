"""A client of openpi's protocol. Needs numpy, msgpack and websockets, and neither torch nor a checkpoint.

>>> with Client("ws://127.0.0.1:8000") as client:
...     reply = client.infer({"observation/image": image, "observation/state": state, "prompt": "Open a drawer"})
>>> reply["actions"].shape  # (horizon, D), robot units
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from vlaflow.errors import RequestError
from vlaflow.serving import wire

logger = logging.getLogger("vlaflow.client")


class Client:
    """One connection, one request at a time. Connects again by itself when the server was started anew.

    Args:
        address: "ws://HOST:PORT".
        token: sent as "Authorization: Api-Key TOKEN".
        timeout_s: longest wait for a connection or an answer.

    Attributes:
        metadata: what the server said first.
        reconnected: how often the connection had to be made anew.
    """

    metadata: dict[str, Any]

    def __init__(self, address: str, token: str | None = None, timeout_s: float = 30.0) -> None:
        self.address, self.token, self.timeout_s, self.reconnected = address, token, timeout_s, 0
        self._open = ExitStack()
        self._connection = self._connect()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for a chunk.

        Args:
            observation: images, state and prompt under the keys of the server's layout; optionally "seed", "reset",
                "deadline_ms", "action_spec", "given" and "inference_delay", "budget_ms".

        Raises:
            RequestError: the server's sentence, or no server.
        """
        message = wire.pack(dict(observation))
        try:
            return self._exchange(message)
        except ConnectionClosed:
            self._connection = self._connect()
            self.reconnected += 1
            logger.warning("%s was lost; connected again to %s", self.address, self.metadata.get("server", "another server"))
            return self._exchange(message)

    def reset(self) -> None:
        """Begin an episode: the noise starts over."""
        self.infer({"reset": True})

    def close(self) -> None:
        """End the connection."""
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
            self._open.close()  # a late answer must not be taken for the next request's
            raise RequestError(f"{self.address} did not answer within {self.timeout_s:g} s.") from error
        if isinstance(reply, str):
            raise RequestError(reply)
        return wire.unpack(reply)

    def _connect(self) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {self.token}"} if self.token else {}
        try:
            self._open.close()
            connection = self._open.enter_context(
                connect(
                    self.address,
                    additional_headers=headers,
                    compression=None,
                    max_size=wire.MOST_BYTES,
                    open_timeout=self.timeout_s,
                )
            )
            first = connection.recv(self.timeout_s)
        except InvalidStatus as error:
            said = error.response.body.decode(errors="replace").strip() or f"HTTP status {error.response.status_code}"
            raise RequestError(f"{self.address} does not take this client: {said:.200}") from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            raise RequestError(f"{self.address} cannot be reached: {error}. Start it: vlaflow serve CKPT") from error
        if isinstance(first, str):
            raise RequestError(f"{self.address} sent text instead of its metadata: {first:.200}")
        self.metadata = wire.unpack(first)
        return connection
