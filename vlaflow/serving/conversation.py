"""The interface of a wire protocol: the server's side of one connection, frame by frame.

``openpi`` and ``vla_eval`` implement it. A conversation holds what the server knows about one client, and nothing is shared
between conversations, so clients do not affect each other.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.data.frames import resize
from vlaflow.errors import RequestError, SpecError
from vlaflow.serving.engine import NEWCOMERS, ActRequest
from vlaflow.serving.request_log import RequestEntry
from vlaflow.spec import ActionPrefix, Chunk, Observation

if TYPE_CHECKING:
    from vlaflow.serving.server import PolicyServer

T = TypeVar("T")
MOST_SIDE = 4096
"""Largest side of an image in pixels."""


class Conversation(ABC):
    """The server's side of one connection.

    Args:
        server: gives the policy, the settings and the engine.

    Attributes:
        answered: whether the client has got a chunk. Until then it has one share of the engine with all others that have not.
        cost: what a request takes of the client's share.
        spend: charges the client for seconds of processor time.
    """

    def __init__(self, server: PolicyServer) -> None:
        self.server, self.answered, self.cost = server, False, 1.0
        self.spend: Callable[[float], None] = lambda _: None

    def greeting(self) -> bytes | None:
        """The server's first frame; None if the client speaks first."""
        return None

    @abstractmethod
    async def answer(self, frame: str | bytes, entry: RequestEntry) -> str | bytes | None:
        """Answer one frame of the client; frames arrive one at a time.

        Args:
            frame: what the client sent.
            entry: record of this request, whose outcome is set here.

        Returns:
            the frame to send, or None if the protocol has no answer to it.

        Raises:
            VlaflowError: the request is invalid or cannot be answered now; the client is sent a ``refusal``.
        """

    def refusal(self, sentence: str) -> str | bytes:
        """The frame that states an error."""
        return sentence

    async def in_thread(self, decode: Callable[[], T]) -> T:
        """Decode a message in a thread, so that those of other clients are read meanwhile, and charge the client for it."""
        seconds = 0.0

        def timed() -> T:
            nonlocal seconds
            began = time.thread_time()
            try:
                return decode()
            finally:
                seconds = time.thread_time() - began

        try:
            return await asyncio.to_thread(timed)
        finally:
            self.spend(seconds)

    async def infer(
        self,
        observation: Observation,
        generator: Generator,
        entry: RequestEntry,
        *,
        compute: ComputePolicy | None = None,
        action_prefix: ActionPrefix | None = None,
        deadline_ms: float | None = None,
    ) -> Chunk:
        """Compute a chunk, together with the requests of other clients, and record it.

        Args:
            observation: the observation.
            generator: generator of the noise.
            entry: record of this request.
            compute: the compute policy; None for the server's.
            action_prefix, deadline_ms: see ``Engine``.

        Raises:
            RequestError: the observation does not fit the policy.
            VlaflowError: see ``Engine.ask``.
        """
        entry.observation, sides = observation, self.server.policy.views
        if any(sides[view] and image.shape[:2] != (sides[view],) * 2 for view, image in observation.images.items()):
            observation = await self.in_thread(lambda: _resized(observation, sides))
        compute = compute.executing(self.server.n_action_steps) if compute else self.server.compute
        request = ActRequest(observation, compute, generator, action_prefix)
        try:
            entry.chunk = await self.server.engine.ask(request, deadline_ms, self if self.answered else NEWCOMERS, self.cost)
        except SpecError as error:
            raise RequestError(str(error)) from error
        self.answered = True
        return entry.chunk


def _resized(observation: Observation, sides: Mapping[str, int | None]) -> Observation:
    """The observation as the policy's processor would resize it; here, the inference thread does not have to wait for it."""
    return replace(observation, images={view: resize(image, sides[view]) for view, image in observation.images.items()})


@dataclass(frozen=True)
class WireProtocol:
    """A wire protocol.

    Args:
        begin: begins the conversation with a client that has connected.
        idle_s: how long its clients may take to answer a ping, if that is longer than the server's ``idle_s``.
    """

    begin: Callable[[PolicyServer], Conversation]
    idle_s: float = 0.0
