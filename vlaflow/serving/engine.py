"""Inference off the event loop: requests of several clients in one bounded queue, answered together by one thread.

A batch is closed when it is full or its first request has waited long enough. Batching changes no answer: every request has its
own noise, and a policy answers an observation alone as in company. A request whose deadline passes while it waits is not
computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import BusyError, DeadlineError
from vlaflow.policies.base import Policy
from vlaflow.spec import Chunk, Observation


@dataclass(frozen=True)
class EngineConfig:
    """How requests are gathered.

    Args:
        batch: most requests answered together.
        wait_ms: how long the first of a batch waits for company.
        queue: most requests waiting; more are refused as busy.
        deadline_ms: a request that has waited longer is given up.
    """

    batch: int = 8
    wait_ms: float = 2.0
    queue: int = 32
    deadline_ms: float = 10_000.0


@dataclass
class Counts:
    """What the engine has done."""

    requests: int = 0
    answered: int = 0
    busy: int = 0
    late: int = 0
    refused: int = 0
    batches: int = 0
    seconds: float = 0.0


@dataclass
class _Waiting:
    observation: Observation
    compute: ComputePolicy
    generator: Generator
    until: float
    answer: asyncio.Future[Chunk]


@dataclass
class Engine:
    """See the module text; ``run`` is a task of the event loop, ``ask`` is called by every connection."""

    policy: Policy
    config: EngineConfig = field(default_factory=EngineConfig)
    counts: Counts = field(default_factory=Counts)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(self.config.queue)
        self._thread = ThreadPoolExecutor(1, "inference")

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    async def ask(
        self, observation: Observation, compute: ComputePolicy, generator: Generator, deadline_ms: float | None = None
    ) -> Chunk:
        """The chunk for one observation.

        Raises:
            BusyError: the queue is full.
            DeadlineError: it waited too long.
            VlaflowError: whatever is wrong with the observation.
        """
        self.counts.requests += 1
        until = self.clock() + (deadline_ms or self.config.deadline_ms) / 1e3
        waiting = _Waiting(observation, compute, generator, until, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            self.counts.busy += 1
            raise BusyError(f"{self.config.queue} requests are waiting already; try again later.") from None
        return await waiting.answer

    async def run(self) -> None:
        """Answer requests until cancelled; what is being computed then is still answered."""
        while True:
            batch = [await self._queue.get()]
            closes = self.clock() + self.config.wait_ms / 1e3
            while len(batch) < self.config.batch and (left := closes - self.clock()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            await asyncio.shield(self._answer(batch))

    async def _answer(self, batch: list[_Waiting]) -> None:
        alive = []
        for waiting in batch:
            if self.clock() > waiting.until:
                self.counts.late += 1
                _settle(waiting, DeadlineError("The request waited longer than its deadline; it was not computed."))
            elif not waiting.answer.done():
                alive.append(waiting)
        # Only observations of one shape and one compute policy can be computed together.
        groups: dict[object, list[_Waiting]] = {}
        for waiting in alive:
            shapes = tuple((view, image.shape) for view, image in sorted(waiting.observation.images.items()))
            groups.setdefault((repr(waiting.compute), shapes, waiting.observation.state.shape), []).append(waiting)
        for group in groups.values():
            began = self.clock()
            await self._compute(group)
            self.counts.batches += 1
            self.counts.seconds += self.clock() - began

    async def _compute(self, group: list[_Waiting]) -> None:
        observations, generators = [w.observation for w in group], [w.generator for w in group]
        loop, compute = asyncio.get_running_loop(), group[0].compute
        states = [g.get_state() for g in generators]
        try:
            chunks = await loop.run_in_executor(
                self._thread, lambda: self.policy.act(observations, compute, generator=generators)
            )
        except Exception as error:  # whatever it was, it is the answer to whoever asked
            if len(group) == 1:
                self.counts.refused += 1
                _settle(group[0], error)
                return
            # One bad request must not spoil the others: each again by itself, with its noise as it was.
            for waiting, state in zip(group, states, strict=True):
                waiting.generator.set_state(state)
                await self._compute([waiting])
            return
        for waiting, chunk in zip(group, chunks, strict=True):
            self.counts.answered += 1
            _settle(waiting, chunk)

    def close(self) -> None:
        """Wait for the thread to finish what it computes."""
        self._thread.shutdown(wait=True)


def _settle(waiting: _Waiting, outcome: Chunk | Exception) -> None:
    if waiting.answer.done():  # whoever asked has gone
        return
    if isinstance(outcome, Exception):
        waiting.answer.set_exception(outcome)
    else:
        waiting.answer.set_result(outcome)
