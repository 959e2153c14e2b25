"""Control that need not stop for inference: the next chunk is made while this one is being executed.

>>> with Client("ws://127.0.0.1:8000") as client, BackgroundTransport(client) as transport:
...     controller = RealtimeController(transport, client.metadata, RealtimeConfig("commit"))
...     controller.begin(look())             # waits for the first chunk
...     while True:                          # once per control period
...         robot.move(controller.act(look).action)

What a chunk's time is: its first action belongs to the moment when its observation was taken, and every action the robot
executes since then uses up one of it. Standing still uses up none. So an answer that comes d actions later is entered at its
action d, and one that the robot had to stand and wait for goes on where the robot stands.

Rules. One request is under way at a time. A robot with nothing left to execute stands still: displacements are 0, absolute
values stay. An answer to an older request, or to one of the episode before, is dropped. An answer that failed is asked for
again at the next step, while what is left is executed. All of it is counted. Time is counted in control steps, so nothing here
sleeps or reads a clock, and a simulation drives it as a robot does.

Needs numpy alone. Shape letters: L chunk size, D action dimension, N actions left.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from vlaflow.errors import ConfigError, RequestError

logger = logging.getLogger("vlaflow.robot")
HandOver = Literal["wait", "switch", "ensemble", "commit"]
Look = Callable[[], Mapping[str, Any]]
"""Takes the observation now, as a request."""


@dataclass(frozen=True)
class RealtimeConfig:
    """How one chunk hands over to the next.

    Args:
        mode: "wait" stands still while the next chunk is made (synchronous); "switch" goes on and changes to the new chunk when
            it comes (naive asynchronous); "ensemble" averages all chunks that speak of this moment, with the weights
            exp(−rate·i), the oldest i = 0 (ACT's temporal ensembling); "commit" tells the policy what will have been executed
            by then, and the new chunk begins with it (real-time chunking).
        n_action_steps: actions of a chunk that are executed before the next one is asked for.
        expected: control steps that an answer takes, until one has been measured.
        memory: latest delays remembered; the longest of them is what "commit" counts on.
        fade: actions over which a new chunk is faded in ("switch" and "commit"); 0 is a hard change.
        rate: of the ensemble's weights.
    """

    mode: HandOver = "commit"
    n_action_steps: int = 8
    expected: int = 1
    memory: int = 10
    fade: int = 0
    rate: float = 0.01

    def __post_init__(self) -> None:
        if min(self.n_action_steps, self.memory) < 1 or min(self.expected, self.fade, self.rate) < 0:
            raise ConfigError("n_action_steps and memory are at least 1; expected, fade and rate at least 0.")


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Args:
        number: of the request.
        reply: the server's, with "actions" (L, D); None when it failed.
        error: why it failed.
    """

    number: int
    reply: Mapping[str, Any] | None
    error: str = ""


class Transport(Protocol):
    """The way to the policy and back; ``transports`` has them."""

    def ask(self, number: int, request: Mapping[str, Any]) -> None:
        """Send a request; never blocks."""

    def poll(self) -> list[Reply]:
        """Answers that have come since; never blocks."""

    def wait(self) -> tuple[list[Reply], float]:
        """At least one answer, and how many control periods it took."""


@dataclass
class RealtimeCounts:
    """What happened, since the controller was made.

    Args:
        asked, answered: requests and answers used.
        failed: answers that were errors.
        dropped: answers to older requests or earlier episodes.
        late: answers that came after more actions than had been committed.
        beyond: requests whose expected delay was longer than could be committed.
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
    """What to do in this control period.

    Args:
        action: (D,) float32, robot units.
        chunk: number of the request whose chunk it is from; of the newest one in an ensemble.
        place: index in that chunk.
        fresh: decided by other requests than the action before: where a chunk really hands over to the next, or enters or
            leaves the average of an ensemble.
        idle: nothing was left; the robot stands still.
    """

    action: np.ndarray
    chunk: int
    place: int
    fresh: bool
    idle: bool


@dataclass
class _Chunk:
    """A chunk as it is executed: ``origin_L`` says by which request each action was decided, ``start`` is the count of
    executed actions at which its first was due.
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
    """See the module text.

    Args:
        transport: to the policy.
        metadata: the server's: "chunk_size", "action_spec", and "max_action_prefix", the longest it can continue.
        config: how chunks hand over.

    Attributes:
        counts: what happened.
        failure: why the latest of the answers that failed did; "" where none did in this episode.
    """

    transport: Transport
    metadata: Mapping[str, Any]
    config: RealtimeConfig = field(default_factory=RealtimeConfig)
    counts: RealtimeCounts = field(default_factory=RealtimeCounts)
    failure: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if not {"chunk_size", "action_spec"} <= self.metadata.keys():
            raise ConfigError(
                "This server does not say its 'chunk_size' and 'action_spec', which real-time control needs; add them to the "
                "metadata, or use vlaflow serve."
            )
        self._chunk_size = int(self.metadata["chunk_size"])
        self._longest = int(self.metadata.get("max_action_prefix", 0))
        dimensions = self.metadata["action_spec"]["dimensions"]
        self._stays_D = np.array([d.get("mode", "delta") == "absolute" for d in dimensions])
        most = self._chunk_size if self.config.mode == "wait" else self._chunk_size - 1
        if self.config.n_action_steps > most:
            before = "" if self.config.mode == "wait" else "; ask for the next one before they are used up"
            raise ConfigError(
                f"Chunks have {self._chunk_size} actions{before}: n_action_steps is at most {most}, got "
                f"{self.config.n_action_steps}."
            )
        if self.config.mode == "commit" and not self._longest:
            raise ConfigError("This server's policy cannot continue committed actions; use mode 'switch' or 'ensemble'.")
        self._number = self._step = self._moved = 0
        self._origin: tuple[int, ...] = ()
        self._request: _Request | None = None
        self._failing = False
        self._chunks: list[_Chunk] = []
        self._last_D = np.zeros(len(dimensions), np.float32)
        self._delays: deque[float] = deque(maxlen=self.config.memory)

    @property
    def delay(self) -> int:
        """Control steps that the next answer is expected to take: the longest of the latest."""
        return math.ceil(max(self._delays, default=self.config.expected))

    def begin(self, request: Mapping[str, Any]) -> None:
        """Start an episode: forget the one before, and wait for the first chunk while the robot stands.

        Args:
            request: the first observation.

        Raises:
            RequestError: when there is no first chunk: the server's sentence, or what is wrong with its answer.
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

    def act(self, look: Look) -> Move:
        """The action for this control period.

        Args:
            look: takes the observation; called only when a chunk is asked for.

        Raises:
            ConfigError: before an episode was begun.
        """
        if not self._chunks:
            raise ConfigError("There is no chunk to execute; begin(request) waits for an episode's first one.")
        self._take(self.transport.poll())
        if self._request is None and self._place() >= self.config.n_action_steps:
            self._ask(look())
            self._take(self.transport.poll())  # an answer that takes no time is used at once
        move = self._move()
        self._step += 1
        self._last_D = move.action
        self._moved += not move.idle
        self.counts.idle += move.idle
        return move

    # -- requests and answers ----------------------------------------------------------------------------------------

    def _place(self) -> int:
        """Actions of the newest chunk that have been used up."""
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
            asked = self._request
            if asked is None or answer.number != asked.number:
                self.counts.dropped += 1
                continue
            self._request = None
            try:
                action_LD = self._actions(answer)
            except RequestError as error:
                self.counts.failed += 1
                if not self._failing and self._chunks:  # once for a row of failures, which come as fast as the robot steps
                    logger.warning("request %d failed, asking again: %s", answer.number, error)
                self._failing, self.failure = True, str(error)
                continue
            if self._failing:
                self._failing = False
                logger.warning("request %d is answered again", answer.number)
            if not measured:
                self._delays.append(self._step - asked.step)
            self.counts.answered += 1
            self.counts.late += self.config.mode == "commit" and self._moved - asked.moved > asked.committed
            origin_L = np.full(self._chunk_size, answer.number)
            origin_L[: asked.committed] = asked.origin_N[: asked.committed]
            action_LD = self._faded(action_LD, asked.moved, max(self._moved - asked.moved, asked.committed))
            self._chunks.append(_Chunk(answer.number, action_LD, origin_L, asked.moved))
            self._chunks = [c for c in self._chunks if self._moved - c.start < self._chunk_size]

    def _actions(self, answer: Reply) -> np.ndarray:
        if answer.reply is None:
            raise RequestError(answer.error)
        try:
            action_LD = np.asarray(answer.reply["actions"], np.float32)
        except (TypeError, ValueError, LookupError) as error:
            raise RequestError("The server's answer has no array of numbers named 'actions'.") from error
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
        said_CD = np.stack([c.action_LD[self._moved - c.start] for c in chunks])
        return ((weight_C[:, None] * said_CD).sum(0) / weight_C.sum()).astype(np.float32)

    def _faded(self, action_LD: np.ndarray, start: int, enters: int) -> np.ndarray:
        """The new chunk as it will be executed: from ``enters`` on it takes over from the newest one in equal steps."""
        if not self.config.fade or not self._chunks or self.config.mode not in ("switch", "commit"):
            return action_LD
        before, action_LD = self._chunks[-1], action_LD.copy()
        ahead = start - before.start  # where the new chunk begins in the one before
        for place in range(enters, min(enters + self.config.fade, self._chunk_size - ahead)):
            share = np.float32((place - enters + 1) / (self.config.fade + 1))
            action_LD[place] = share * action_LD[place] + (1 - share) * before.action_LD[place + ahead]
        return action_LD
