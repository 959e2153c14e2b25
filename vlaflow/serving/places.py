"""The places of a server's clients: how many there are, and which idle client gives its own to a new one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from websockets.asyncio.server import ServerConnection


class ClientPlaces:
    """Who is connected, and how long each may stay idle when others want its place.

    Args:
        most: number of places.
        unused_s: how long a client that has sent no request keeps its place, in seconds.
        idle_s: how long a client keeps it after its last request, in seconds.
        clock: gives the time in seconds.
    """

    def __init__(self, most: int, unused_s: float, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._unused_s, self._idle_s, self._clock = most, unused_s, idle_s, clock
        self._until: dict[ServerConnection, float] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def make_room(self) -> bool:
        """Whether there is a place; if need be, the client that has been idle beyond its time for longest loses its own."""
        if len(self._until) < self._most:
            return True
        idlest = min(self._until, key=lambda connection: self._until[connection])
        if self._until[idlest] > self._clock():
            return False
        del self._until[idlest]
        closing = asyncio.ensure_future(idlest.close(1013, "Another client needed the place of this idle one."))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return True

    @contextmanager
    def taken(self, connection: ServerConnection) -> Iterator[None]:
        """Context of a client that has a place."""
        self._until[connection] = self._clock() + self._unused_s
        try:
            yield
        finally:
            self._until.pop(connection, None)

    @contextmanager
    def busy(self, connection: ServerConnection) -> Iterator[None]:
        """Context of a request, during which a client is not idle."""
        self._set(connection, math.inf)
        try:
            yield
        finally:
            self._set(connection, self._clock() + self._idle_s)

    def _set(self, connection: ServerConnection, until: float) -> None:
        if connection in self._until:
            self._until[connection] = until
