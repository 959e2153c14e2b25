"""Real-time control: the next chunk is computed while the current one is being executed.

>>> with Client("ws://127.0.0.1:8000") as client, BackgroundTransport(client) as transport:
...     controller = RealtimeController(transport, client.metadata, RealtimeConfig("commit"))
...     controller.begin(observe())          # waits for the first chunk
...     while True:                          # once per control period
...         robot.move(controller.act(observe).action)

Timing of a chunk: its first action belongs to the time step of its observation, and every action that the robot executes since
then uses up one action of the chunk. Idle steps use up none. So a chunk that arrives d actions later is entered at its action
d, and one that the robot had to wait for continues where the robot stopped.

Rules. One request is in progress at a time. A robot with nothing left to execute is idle: displacements are 0, absolute values
are held. A reply to an earlier request, or to one of the previous episode, is dropped. A failed request is repeated at the next
step, while the rest of the chunk is executed. All of this is counted. Time is counted in control steps, so nothing here sleeps
or reads a clock, and a simulation can drive the controller as a robot does.

Needs only numpy. Shape letters: L chunk size, D action dimension, N actions left.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

from vlaflow.errors import ConfigError, RequestError, nearest

logger = logging.getLogger("vlaflow.robot")
HandOver = Literal["wait", "switch", "ensemble", "commit"]
Observe = Callable[[], Mapping[str, Any]]
"""Returns the current observation as a request."""


@dataclass(frozen=True)
class RealtimeConfig:
    """How one chunk hands over to the next.

    Args:
        mode: "wait" is idle while the next chunk is computed (synchronous); "switch" continues and changes to the new chunk
            when it arrives (naive asynchronous); "ensemble" averages all chunks that contain the current step, with weights
            exp(−rate·i), i = 0 for the oldest (ACT's temporal ensembling); "commit" sends the policy the actions that will
            have been executed by then, and the new chunk begins with them (real-time chunking).
        n_action_steps: actions of a chunk that are executed before the next one is requested.
        expected: expected delay of a reply in control steps, until one has been measured.
        memory: number of recent delays to remember; "commit" expects the longest of them.
        fade: number of actions over which a new chunk is faded in ("switch" and "commit"); 0 for an abrupt change.
        rate: decay rate of the weights of "ensemble".
    """

    mode: HandOver = "commit"
    n_action_steps: int = 8
    expected: int = 1
    memory: int = 10
    fade: int = 0
    rate: float = 0.01

    def __post_init__(self) -> None:
        if self.mode not in get_args(HandOver):
            raise ConfigError(f"There is no mode '{self.mode}'; {nearest(self.mode, get_args(HandOver))}")
        if min(self.n_action_steps, self.memory) < 1 or min(self.expected, self.fade, self.rate) < 0:
            raise ConfigError("n_action_steps and memory must be at least 1; expected, fade and rate at least 0.")


@dataclass(frozen=True)
class Reply:
    """The outcome of a request.

    Args:
        number: number of the request.
        reply: the server's reply, with "actions" (L, D); None if the request failed.
        error: why it failed.
    """

    number: int
    reply: Mapping[str, Any] | None
    error: str = ""


class Transport(Protocol):
    """Sends requests to the policy and receives its replies; see ``transports``."""

    def ask(self, number: int, request: Mapping[str, Any]) -> None:
        """Send a request; never blocks."""

    def poll(self) -> list[Reply]:
        """Replies that have arrived since the last call; never blocks."""

    def wait(self) -> tuple[list[Reply], float]:
        """Wait for at least one reply; returns the replies and the number of control periods waited."""


@dataclass
class RealtimeCounts:
    """Counts of events since the controller was created.

    Args:
        requests, answered: requests sent and replies used.
        failed: requests that failed.
        dropped: replies to earlier requests or episodes.
        late: replies that arrived after more actions than had been committed.
        beyond: requests whose expected delay was longer than the policy can commit.
        idle: control steps without an action to execute.
    """

    requests: int = 0
    answered: int = 0
    failed: int = 0
    dropped: int = 0
    late: int = 0
    beyond: int = 0
    idle: int = 0


@dataclass(frozen=True)
class Move:
    """The action of one control period.

    Args:
        action: (D,) float32, robot units.
        chunk: number of the request whose chunk it is from; the newest one for "ensemble".
        place: index in that chunk.
        fresh: whether it comes from other requests than the previous action: where a chunk takes over from another, or
            enters or leaves the average of "ensemble".
        idle: whether there was nothing left to execute, so that the robot stops.
    """

    action: np.ndarray
    chunk: int
    place: int
    fresh: bool
    idle: bool


@dataclass
class _Chunk:
    """A chunk being executed.

    ``origin_L`` is the request that decided each action, ``start`` the number of executed actions when its first was due.
    """

    number: int
    action_LD: np.ndarray
    origin_L: np.ndarray
    start: int


@dataclass(frozen=True)
class _Request:
    number: int
    step: int
    moved: int
    committed: int
    origin_N: np.ndarray


@dataclass
class RealtimeController:
    """Executes chunks while the next ones are computed; see the module docstring.

    Args:
        transport: connection to the policy.
        metadata: the server's "chunk_size", "action_spec", and "max_action_prefix", the longest prefix it can continue.
        config: how chunks hand over.

    Attributes:
        counts: counts of events.
        failure: why the latest failed request failed; "" if none has failed in this episode.
    """

    transport: Transport
    metadata: Mapping[str, Any]
    config: RealtimeConfig = field(default_factory=RealtimeConfig)
    counts: RealtimeCounts = field(default_factory=RealtimeCounts)
    failure: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if not {"chunk_size", "action_spec"} <= self.metadata.keys():
            raise ConfigError(
                "The server's metadata lacks 'chunk_size' or 'action_spec', which real-time control needs; add them to the "
                "metadata, or use vlaflow serve."
            )
        self._chunk_size = int(self.metadata["chunk_size"])
        self._longest = int(self.metadata.get("max_action_prefix", 0))
        dimensions = self.metadata["action_spec"]["dimensions"]
        unstated = [d["name"] for d in dimensions if d.get("mode") == "unstated"]
        if unstated:
            raise ConfigError(
                f"The server's action spec does not say whether '{unstated[0]}' is a displacement or an absolute value, so it "
                "is unknown what keeps the robot in place. State it (vlaflow data spec) and train with --action-spec FILE, or "
                "write it into the checkpoint's action_spec.json."
            )
        self._stays_D = np.array([d.get("mode", "delta") == "absolute" for d in dimensions])
        most = self._chunk_size if self.config.mode == "wait" else self._chunk_size - 1
        if self.config.n_action_steps > most:
            before = "" if self.config.mode == "wait" else ", and the next one must be requested before they are used up"
            raise ConfigError(
                f"Chunks have {self._chunk_size} actions{before}: n_action_steps must be at most {most}, got "
                f"{self.config.n_action_steps}."
            )
        if self.config.mode == "commit" and not self._longest:
            raise ConfigError("The server's policy cannot continue committed actions; use mode 'switch' or 'ensemble'.")
        self._number = self._step = self._moved = 0
        self._origin: tuple[int, ...] = ()
        self._request: _Request | None = None
        self._failing = False
        self._chunks: list[_Chunk] = []
        self._last_D = np.zeros(len(dimensions), np.float32)
        self._delays: deque[float] = deque(maxlen=self.config.memory)

    @property
    def delay(self) -> int:
        """Expected delay of the next reply in control steps: the longest of the recent ones."""
        return math.ceil(max(self._delays, default=self.config.expected))

    def begin(self, request: Mapping[str, Any]) -> None:
        """Start an episode: forget the previous one, and wait for the first chunk.

        Args:
            request: the first observation.

        Raises:
            RequestError: there is no first chunk, because the server refused the request or its reply is invalid.
        """
        self._chunks, self._step, self._moved, self._failing, self.failure = [], 0, 0, False, ""
        self._ask({**request, "reset": True})
        while not self._chunks:
            answers, waited = self.transport.wait()
            if any(answer.number == self._number for answer in answers):
                self._delays.append(waited)
            self._take(answers, measured=True)
            if self._request is None and not self._chunks:
                raise RequestError(self.failure)

    def act(self, observe: Observe) -> Move:
        """The action for this control period.

        Args:
            observe: returns the observation; called only when a chunk is requested.

        Raises:
            ConfigError: no episode was started.
        """
        if not self._chunks:
            raise ConfigError("There is no chunk to execute; call begin(request) at the start of an episode.")
        self._take(self.transport.poll())
        if self._request is None and self._place() >= self.config.n_action_steps:
            self._ask(observe())
            self._take(self.transport.poll())  # a reply without delay is used at once
        move = self._move()
        self._step += 1
        self._last_D = move.action
        self._moved += not move.idle
        self.counts.idle += move.idle
        return move

    # -- requests and answers ----------------------------------------------------------------------------------------

    def _place(self) -> int:
        """Number of actions of the newest chunk that have been used up."""
        return self._moved - self._chunks[-1].start

    def _ask(self, request: Mapping[str, Any]) -> None:
        committed, message, origin_N = 0, dict(request), np.zeros(0, int)
        if self.config.mode == "commit" and self._chunks:
            left_ND = self._chunks[-1].action_LD[self._place() :]
            origin_N = self._chunks[-1].origin_L[self._place() :]
            committed = min(self.delay, self._longest, len(left_ND))
            self.counts.beyond += self.delay > committed
            if len(left_ND):
                message |= {"action_prefix": left_ND, "inference_delay": committed}
        self._number += 1
        self._request = _Request(self._number, self._step, self._moved, committed, origin_N)
        self.counts.requests += 1
        self.transport.ask(self._number, message)

    def _take(self, answers: list[Reply], measured: bool = False) -> None:
        for answer in answers:
            request = self._request
            if request is None or answer.number != request.number:
                self.counts.dropped += 1
                continue
            self._request = None
            try:
                action_LD = self._actions(answer)
            except RequestError as error:
                self.counts.failed += 1
                if not self._failing and self._chunks:  # once per series of failures, which can repeat at every control step
                    logger.warning("request %d failed, repeating it: %s", answer.number, error)
                self._failing, self.failure = True, str(error)
                continue
            if self._failing:
                self._failing = False
                logger.warning("request %d succeeded again", answer.number)
            if not measured:
                self._delays.append(self._step - request.step)
            self.counts.answered += 1
            self.counts.late += self.config.mode == "commit" and self._moved - request.moved > request.committed
            origin_L = np.full(self._chunk_size, answer.number)
            origin_L[: request.committed] = request.origin_N[: request.committed]
            action_LD = self._faded(action_LD, request.moved, max(self._moved - request.moved, request.committed))
            self._chunks.append(_Chunk(answer.number, action_LD, origin_L, request.moved))
            self._chunks = [c for c in self._chunks if self._moved - c.start < self._chunk_size]

    def _actions(self, answer: Reply) -> np.ndarray:
        if answer.reply is None:
            raise RequestError(answer.error)
        try:
            action_LD = np.asarray(answer.reply["actions"], np.float32)
        except (TypeError, ValueError, LookupError) as error:
            raise RequestError("The server's reply has no array of numbers named 'actions'.") from error
        if action_LD.shape != (self._chunk_size, len(self._stays_D)) or not np.isfinite(action_LD).all():
            raise RequestError(
                f"The server's actions are not a finite chunk of shape {(self._chunk_size, len(self._stays_D))}."
            )
        return action_LD

    # -- actions -----------------------------------------------------------------------------------------------------

    def _move(self) -> Move:
        newest, place = self._chunks[-1], self._place()
        waiting = self.config.mode == "wait" and self._request is not None and place >= self.config.n_action_steps
        if waiting or place >= self._chunk_size:
            return Move(np.where(self._stays_D, self._last_D, np.float32(0)), newest.number, place, fresh=False, idle=True)
        if self.config.mode == "ensemble":
            chunks = [c for c in self._chunks if self._moved - c.start < self._chunk_size]
            action_D, origin = self._mean(chunks), tuple(c.number for c in chunks)
        else:
            action_D, origin = newest.action_LD[place], (int(newest.origin_L[place]),)
        fresh, self._origin = origin != self._origin, origin
        return Move(action_D, newest.number, place, fresh, idle=False)

    def _mean(self, chunks: list[_Chunk]) -> np.ndarray:
        weight_C = np.exp(-self.config.rate * np.arange(len(chunks)))
        action_CD = np.stack([c.action_LD[self._moved - c.start] for c in chunks])
        return ((weight_C[:, None] * action_CD).sum(0) / weight_C.sum()).astype(np.float32)

    def _faded(self, action_LD: np.ndarray, start: int, enters: int) -> np.ndarray:
        """Fade the new chunk in: from index ``enters`` on, it replaces the current one in equal steps."""
        if not self.config.fade or not self._chunks or self.config.mode not in ("switch", "commit"):
            return action_LD
        before, action_LD = self._chunks[-1], action_LD.copy()
        ahead = start - before.start  # where the new chunk begins in the current one
        for place in range(enters, min(enters + self.config.fade, self._chunk_size - ahead)):
            share = np.float32((place - enters + 1) / (self.config.fade + 1))
            action_LD[place] = share * action_LD[place] + (1 - share) * before.action_LD[place + ahead]
        return action_LD
