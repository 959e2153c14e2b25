"""Inference off the event loop: requests of several clients in one bounded, fair queue, answered together by one thread.

A batch is closed when it is full, or when its first request has waited long enough and no other request is waiting. Batching
changes no result: every request has its own noise, and the chunk for an observation does not depend on the rest of the batch. A
request whose deadline passes while it waits fails at that time and is not computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import BusyError, ConfigError, DeadlineError
from vlaflow.policies.action_prefix import longest_action_prefix
from vlaflow.policies.base import Policy
from vlaflow.policies.example import example
from vlaflow.serving.fair_queue import FairQueue
from vlaflow.spec import ActionPrefix, Chunk, Observation

logger = logging.getLogger("vlaflow.serving")


class _Client:
    """Someone who asks."""


NEWCOMERS = _Client()
"""Stands for all clients that have not been answered yet: they have one share, so that reconnecting brings nothing."""


@dataclass(frozen=True)
class EngineConfig:
    """How requests are batched.

    Args:
        batch: largest number of requests per batch.
        wait_ms: how long the first request of a batch waits for others.
        queue: largest number of waiting requests; more are refused as busy.
        deadline_ms: longest wait of a request before it fails.
        guided: continue action prefixes by guidance even if the decoder was trained for them.
    """

    batch: int = 8
    wait_ms: float = 2.0
    queue: int = 32
    deadline_ms: float = 10_000.0
    guided: bool = False

    def __post_init__(self) -> None:
        if min(self.batch, self.queue) < 1 or self.wait_ms < 0 or not self.deadline_ms > 0:
            raise ConfigError("batch and queue must be at least 1, wait_ms at least 0 and deadline_ms above 0.")


@dataclass
class BatchCounts:
    """Counts of the engine since it was created."""

    requests: int = 0
    answered: int = 0
    busy: int = 0
    late: int = 0
    refused: int = 0
    batches: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ActRequest:
    """A decoded request.

    Args:
        observation: the observation.
        compute: the compute policy.
        generator: generator of the noise.
        action_prefix: actions of the current chunk with which the new one begins.
    """

    observation: Observation
    compute: ComputePolicy
    generator: Generator
    action_prefix: ActionPrefix | None = None

    @property
    def kind(self) -> object:
        """Requests of equal kind can be batched: same compute policy and shapes, and all or none with an action prefix."""
        shapes = tuple((view, image.shape) for view, image in sorted(self.observation.images.items()))
        return repr(self.compute), shapes, self.observation.state.shape, self.action_prefix is None


@dataclass(eq=False)
class _Waiting:
    request: ActRequest
    until: float
    answer: asyncio.Future[Chunk]
    begun: bool = False


@dataclass
class Engine:
    """Batches and computes requests; ``run`` is a task of the event loop, ``ask`` is called by every connection.

    Attributes:
        computing: whether a batch is being computed.
    """

    policy: Policy
    config: EngineConfig = field(default_factory=EngineConfig)
    counts: BatchCounts = field(default_factory=BatchCounts)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._queue = FairQueue[_Waiting](self.config.queue)
        self._thread = ThreadPoolExecutor(1, "inference")
        self.computing = False

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    async def ask(
        self, request: ActRequest, deadline_ms: float | None = None, client: object = NEWCOMERS, cost: float = 1.0
    ) -> Chunk:
        """Compute the chunk for one request.

        Args:
            request: what to compute.
            deadline_ms: longest wait; None for that of the config.
            client: who asks; requests of several clients are computed in a fair order (``fair_queue``).
            cost: what the request takes of the client's share.

        Raises:
            BusyError: the queue is full.
            DeadlineError: the request waited too long.
            VlaflowError: the observation is invalid.
        """
        self.counts.requests += 1
        seconds, loop = (self.config.deadline_ms if deadline_ms is None else deadline_ms) / 1e3, asyncio.get_running_loop()
        waiting = _Waiting(request, self.clock() + seconds, loop.create_future())
        try:
            self._queue.put(client, waiting, cost)
        except asyncio.QueueFull:
            self.counts.busy += 1
            raise BusyError(f"{self.config.queue} requests are waiting already; try again later.") from None
        timer = loop.call_later(seconds, self._expire, waiting)
        try:
            return await waiting.answer
        finally:
            timer.cancel()
            self._queue.remove(waiting)  # of a client that has left

    async def warm_up(self, compute: ComputePolicy, rounds: int) -> None:
        """Compute dummy chunks: ``rounds`` times a single one, and once a full batch, each with and without an action prefix.

        The first chunks of a process and of a thread are slow (lazy initialisation, growing memory, kernel selection and
        compilation), and clients should not have to wait for them. If a full batch fails, e.g. for lack of memory, requests
        of clients are computed one by one.
        """
        observation, policy = example(self.policy), self.policy
        longest, spec = longest_action_prefix(policy), policy.action_spec
        continues = self.config.guided or longest
        usual_1D = np.array([policy.stats["action"].mean], np.float32).clip(spec.low, spec.high)
        prefix = ActionPrefix(usual_1D, min(1, longest))
        loop = asyncio.get_running_loop()
        for size, times in ((1, rounds), (self.config.batch, 1)):
            for action_prefix in (None, prefix) if continues else (None,):
                requests = [ActRequest(observation, compute, Generator().manual_seed(i), action_prefix) for i in range(size)]
                for _ in range(times):
                    try:
                        await loop.run_in_executor(self._thread, self._act, requests)
                    except (RuntimeError, MemoryError):  # torch reports a lack of memory like this; anything else is a bug
                        if size == 1:
                            raise
                        logger.warning("%d requests at once cannot be computed together", size, exc_info=True)

    async def run(self) -> None:
        """Process requests until cancelled; a batch in progress is still finished."""
        while True:
            batch = [await self._queue.get()]
            closes = self.clock() + self.config.wait_ms / 1e3
            while len(batch) < self.config.batch:
                if self.waiting:  # requests that are already waiting join the batch
                    batch.append(self._queue.get_nowait())
                    continue
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), closes - self.clock()))
                except TimeoutError:
                    break
            await asyncio.shield(self._answer(batch))

    async def _answer(self, batch: list[_Waiting]) -> None:
        groups: dict[object, list[_Waiting]] = {}
        for waiting in batch:
            groups.setdefault(waiting.request.kind, []).append(waiting)
        for group in groups.values():
            alive = [waiting for waiting in group if self._in_time(waiting)]
            if not alive:
                continue
            for waiting in alive:
                waiting.begun = True
            began = self.clock()
            self.computing = True
            await self._compute(alive)
            self.computing = False
            self.counts.batches += 1
            self.counts.seconds += self.clock() - began

    def _in_time(self, waiting: _Waiting) -> bool:
        """Whether the client is still waiting for the request."""
        if self.clock() > waiting.until:
            self._expire(waiting)
        return not waiting.answer.done()

    def _expire(self, waiting: _Waiting) -> None:
        if waiting.begun or waiting.answer.done():
            return
        self.counts.late += 1
        _resolve(waiting, DeadlineError("The request waited longer than its deadline; it was not computed."))

    async def _compute(self, group: list[_Waiting]) -> None:
        requests, loop = [waiting.request for waiting in group], asyncio.get_running_loop()
        states = [a.generator.get_state() for a in requests]
        try:
            chunks = await loop.run_in_executor(self._thread, self._act, requests)
        except Exception as error:  # any error is the result of the request
            if len(group) == 1:
                self.counts.refused += 1
                _resolve(group[0], error)
                return
            # One bad request must not affect the others: repeat each by itself, with the same noise.
            for waiting, state in zip(group, states, strict=True):
                waiting.request.generator.set_state(state)
                await self._compute([waiting])
            return
        for waiting, chunk in zip(group, chunks, strict=True):
            self.counts.answered += 1
            _resolve(waiting, chunk)

    def _act(self, requests: list[ActRequest]) -> list[Chunk]:
        return self.policy.act(
            [a.observation for a in requests],
            requests[0].compute,
            generator=[a.generator for a in requests],
            action_prefix=[a.action_prefix for a in requests],
            guided=self.config.guided,
        )

    def close(self) -> None:
        """Wait for the thread to finish its batch."""
        self._thread.shutdown(wait=True)


def _resolve(waiting: _Waiting, outcome: Chunk | Exception) -> None:
    if waiting.answer.done():  # the client has left
        return
    if isinstance(outcome, Exception):
        waiting.answer.set_exception(outcome)
    else:
        waiting.answer.set_result(outcome)
