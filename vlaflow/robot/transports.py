"""The two ways to a policy that a real-time controller has: a thread next to the robot's loop, and a simulated delay."""

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


class Asks(Protocol):
    """What a transport needs of a client."""

    metadata: dict[str, Any]

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk, or `RequestError`."""


class BackgroundTransport:
    """Requests go out from a thread of their own, one after the other; the robot's loop never waits.

    Args:
        client: asked by the thread alone. It connects again by itself after a restart of the server.

    Raises:
        ConfigError: when the server does not say its control rate.

    >>> with BackgroundTransport(client) as transport: ...
    """

    def __init__(self, client: Asks) -> None:
        if "rate_hz" not in client.metadata:
            raise ConfigError("This server does not say its 'rate_hz', which real-time control needs; use vlaflow serve.")
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
        """End the thread once it has its answer."""
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
                logger.exception("request %d met a defect of the client", number)
                answer = Reply(number, None, f"{type(error).__name__}: {error}")
            self._answers.put(answer)


class SimulatedTransport:
    """Answers are made at once and handed out so many control steps later, so that every delay is measured on one clock.

    Args:
        infer: makes an answer.
        delay: control steps that the next one takes, 0 or more.

    ``tick`` once per control step.
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
        """See ``Transport``; the robot stands, so the time passes at once."""
        began = self._now
        self._now = max(self._now, min(when for when, _ in self._under_way))
        return self.poll(), float(self._now - began)

    def tick(self) -> None:
        """A control step passes."""
        self._now += 1
