"""A bounded queue that is fair per client: one that takes less than its share does not wait for those that want more.

Start-time fair queueing (Goyal, Vin and Cheng 1996) with credit: an item starts at the virtual time at which its client's item
before it has been paid for, and what starts first is given out first. Virtual time is the latest start of an item given out. A
client that rests keeps a credit of ``CREDIT``, so that it is next when it asks again; a new one starts now.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
CREDIT = 4.0
"""Items that a client can have at once after a rest, before others have their turn."""


class FairQueue(Generic[T]):
    """Items of several clients.

    Args:
        most: largest number of items.
    """

    def __init__(self, most: int) -> None:
        self._most, self._now, self._arrivals = most, 0.0, 0
        self._items: dict[tuple[float, int], T] = {}  # by start and arrival
        self._paid: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, client: object, item: T, cost: float = 1.0) -> None:
        """Add an item.

        Args:
            client: whose item it is.
            item: anything.
            cost: what it takes of the client's share.

        Raises:
            asyncio.QueueFull: there are ``most`` items.
        """
        if len(self._items) >= self._most:
            raise asyncio.QueueFull
        start = max(self._paid.get(client, self._now), self._now - CREDIT)
        self._paid[client] = start + cost
        self._items[start, self._arrivals] = item
        self._arrivals += 1
        self._filled.set()

    def remove(self, item: T) -> None:
        """Remove an item if it is still there."""
        for place, each in self._items.items():
            if each is item:
                self._take(place)
                return

    async def get(self) -> T:
        """Take the next item, as soon as there is one."""
        while not self._items:
            await self._filled.wait()
        return self.get_nowait()

    def get_nowait(self) -> T:
        """Take the next item; there is one."""
        place = min(self._items)
        self._now = max(self._now, place[0])
        return self._take(place)

    def _take(self, place: tuple[float, int]) -> T:
        item = self._items.pop(place)
        if not self._items:
            self._filled.clear()
        return item
