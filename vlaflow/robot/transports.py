"""Transports of a real-time controller: a background thread, and a simulated delay."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from vlaflow.errors import ConfigError, RequestError
from vlaflow.robot.realtime import Reply

logger = logging.getLogger("vlaflow.robot")
Infer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class InferenceClient(Protocol):
    """The client that a transport needs."""

    metadata: dict[str, Any]

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Request a chunk; raises `RequestError`."""


class BackgroundTransport:
    """Sends requests from a background thread, one at a time, so that the control loop never waits.

    Args:
        client: used by the thread alone. It reconnects automatically after a restart of the server.

    Raises:
        ConfigError: the server's metadata lacks its control rate.

    >>> with BackgroundTransport(client) as transport: ...
    """

    def __init__(self, client: InferenceClient) -> None:
        if "rate_hz" not in client.metadata:
            raise ConfigError("The server's metadata lacks 'rate_hz', which real-time control needs; use vlaflow serve.")
        self._client = client
        self._rate_hz = float(client.metadata["rate_hz"])
        self._requests: queue.Queue[tuple[int, Mapping[str, Any]] | None] = queue.Queue()
        self._answers: queue.Queue[Reply] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def ask(self, number: int, request: Mapping[str, Any]) -> None:
        """See ``Transport``."""
        self._requests.put((number, request))

    def poll(self) -> list[Reply]:
        """See ``Transport``."""
        found = []
        while True:
            try:
                found.append(self._answers.get_nowait())
            except queue.Empty:
                return found

    def wait(self) -> tuple[list[Reply], float]:
        """See ``Transport``."""
        began = time.monotonic()
        first = self._answers.get()
        return [first, *self.poll()], (time.monotonic() - began) * self._rate_hz

    def close(self) -> None:
        """Stop the thread after its current request."""
        self._requests.put(None)
        self._thread.join()

    def __enter__(self) -> BackgroundTransport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while (item := self._requests.get()) is not None:
            number, request = item
            try:
                answer = Reply(number, self._client.infer(request))
            except RequestError as error:
                answer = Reply(number, None, str(error))
            except Exception as error:
                logger.exception("request %d failed because of a bug in the client", number)
                answer = Reply(number, None, f"{type(error).__name__}: {error}")
            self._answers.put(answer)


class SimulatedTransport:
    """Computes replies at once and delivers them a number of control steps later, so that all delays follow one clock.

    Args:
        infer: computes a reply.
        delay: returns the delay of the next reply in control steps, at least 0.

    Call ``tick`` once per control step.
    """

    def __init__(self, infer: Infer, delay: Callable[[], int]) -> None:
        self._infer, self._delay, self._now = infer, delay, 0
        self._under_way: list[tuple[int, Reply]] = []

    def ask(self, number: int, request: Mapping[str, Any]) -> None:
        """See ``Transport``."""
        try:
            answer = Reply(number, self._infer(request))
        except RequestError as error:
            answer = Reply(number, None, str(error))
        self._under_way.append((self._now + self._delay(), answer))

    def poll(self) -> list[Reply]:
        """See ``Transport``."""
        due = [answer for when, answer in self._under_way if when <= self._now]
        self._under_way = [(when, answer) for when, answer in self._under_way if when > self._now]
        return due

    def wait(self) -> tuple[list[Reply], float]:
        """See ``Transport``; the simulated time passes at once."""
        began = self._now
        self._now = max(self._now, min(when for when, _ in self._under_way))
        return self.poll(), float(self._now - began)

    def tick(self) -> None:
        """Advance by one control step."""
        self._now += 1
