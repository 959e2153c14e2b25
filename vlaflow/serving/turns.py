"""Who may use the event loop, and when: a client that uses more than its part of the time waits its turn.

Reading, parsing and decoding messages holds the interpreter's lock, which inference needs between any two operations. So what
a connection spends is counted (``Account``). A connection that spends little is never held up. One that spends more stands in
line, gets a turn of ``TURN_S`` at a time, and those in line get ``DUTY`` of the time together (``Turns``).

Connections that have not been answered yet share one account, so that reconnecting brings nothing.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode

DUTY = 1 / 3
"""Part of the time that the clients in line get together."""
RATE = 0.03
"""Part of the time that a client may use without standing in line."""
ALLOWANCE_S = 0.01
"""What it may use at once, in seconds."""
PACED_COST = 4.0
"""What an inference takes of the share of a client that has been in line, where that of others takes 1."""
TURN_S = 0.002
"""Length of a turn in seconds."""
PER_READ_S, PER_MESSAGE_S, PER_CONNECTION_S = 2e-5, 3e-4, 1e-3
"""What a read, a message and a connection cost apart from what is measured, in seconds."""
MOST_OPENING = 64
"""Connections that have not sent their headers yet; beyond them, the oldest is dropped."""
PINGS_PER_S = 20
_UNREAD_BYTES = 2**14
"""Replies that are sent to a client before it has read the first; more requests of it are not answered."""
_READ_BYTES, _PACED_BYTES = 2**14, 2**12
"""Bytes per read, and per read of clients that have been in line: the smallest frames in it take 25 and 6 ms."""


class WorkingClock:
    """The time during which the server could work, in seconds: while it computes, what it gets of a processor, otherwise all.

    On a busy machine, a second without a client's messages is not yet a second for the others.

    Args:
        computing: tells whether an inference is being computed.
        clock, processor_clock: give the time, and the processor time of this process.
    """

    def __init__(
        self,
        computing: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        processor_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._computing, self._clock, self._processor_clock = computing, clock, processor_clock
        self._now, self._at, self._processor_at = 0.0, clock(), processor_clock()

    def __call__(self) -> float:
        """The time now."""
        at, processor_at = self._clock(), self._processor_clock()
        passed, worked = at - self._at, processor_at - self._processor_at
        self._now += min(passed, worked) if self._computing() else passed
        self._at, self._processor_at = at, processor_at
        return self._now


class Account:
    """The seconds that a client has spent beyond its part.

    Args:
        clock: gives the time in seconds.

    Attributes:
        paced: whether it has been in debt and has not yet recovered entirely; what it spends then delays the next turn.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.paced = False
        self._clock, self._spent, self._at = clock, 0.0, clock()

    def spend(self, seconds: float) -> None:
        """Add what was spent."""
        self._recover()
        self._spent += seconds
        self.paced |= self._spent > ALLOWANCE_S

    @property
    def in_debt(self) -> bool:
        """Whether the client must stand in line."""
        self._recover()
        return self._spent > ALLOWANCE_S

    def forgive(self) -> None:
        """Let the client spend one more turn."""
        self._spent = min(self._spent, ALLOWANCE_S - TURN_S)

    def _recover(self) -> None:
        now = self._clock()
        self._spent, self._at = max(self._spent - RATE * (now - self._at), 0.0), now
        self.paced &= self._spent > 0


class Turns:
    """The line of clients that wait for a turn, and the connections that are being opened.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.newcomers = clock, Account(clock)
        self._line: deque[LimitedConnection] = deque()
        self._opening: OrderedDict[LimitedConnection, None] = OrderedDict()
        self._spent, self._since = 0.0, clock()
        self._timer: asyncio.Handle | None = None

    def spend(self, seconds: float) -> None:
        """Count what a client in line spent."""
        self._spent += seconds

    def join(self, connection: LimitedConnection) -> None:
        """Put a connection at the end of the line."""
        self._line.append(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        """Give the first in line its turn, as soon as the turn before has been paid for."""
        loop, now = asyncio.get_running_loop(), self.clock()
        pause = self._spent / DUTY - (now - self._since)
        if pause > 0:
            self._timer = loop.call_later(pause, self._next)
            return
        self._spent, self._since, self._timer = 0.0, now, None
        if self._line:
            self._line.popleft().take_turn()
            self._timer = loop.call_later(TURN_S, self._next)

    def open(self, connection: LimitedConnection) -> None:
        """Remember a connection until it has sent its headers; drop the oldest if there are too many."""
        self._opening[connection] = None
        if len(self._opening) > MOST_OPENING:
            oldest, _ = self._opening.popitem(last=False)
            oldest.transport.abort()

    def opened(self, connection: LimitedConnection) -> None:
        """Forget a connection that has sent its headers, or is lost."""
        self._opening.pop(connection, None)


class LimitedConnection(ServerConnection):
    """A connection that waits its turn, and is dropped when its client sends more than ``PINGS_PER_S`` pings within a second.

    Args:
        turns: of the server.
        arguments, more: of the websocket library.
    """

    def __init__(self, turns: Turns, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._turns, self._account = turns, turns.newcomers
        self._turn: asyncio.Future[None] | None = None
        self._held: set[str] = set()
        self._pings, self._since = 0, 0.0
        self._unread: asyncio.TimerHandle | None = None

    def opened(self) -> None:
        """Note that the client has sent its headers."""
        self._turns.opened(self)

    def establish(self) -> None:
        """Give the client an account of its own, once it has been answered or has stayed."""
        if self._account is self._turns.newcomers:
            self._account = Account(self._turns.clock)

    def spend(self, seconds: float) -> None:
        """Charge the client for what it made the server do."""
        self._account.spend(seconds)
        if self._account.paced:
            self._turns.spend(seconds)

    @property
    def cost(self) -> float:
        """What an inference takes of the client's share."""
        return PACED_COST if self._account.paced else 1.0

    async def turn(self) -> None:
        """Wait until the client may make the server do something."""
        if self._account.in_debt:
            self._stand_in_line()
            assert self._turn is not None
            await asyncio.shield(self._turn)

    def take_turn(self) -> None:
        """Go on; called by ``Turns``."""
        self._account.forgive()
        if self._turn is not None:
            self._turn.set_result(None)
            self._turn = None
        self._release("turn")

    def _stand_in_line(self) -> None:
        if self._turn is None:
            self._turn = self.loop.create_future()
            self._hold("turn")
            self._turns.join(self)

    # -- called by asyncio and the websocket library -----------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Read small pieces, so that no client keeps the event loop for long, and wait for clients that do not read."""
        super().connection_made(transport)
        self._choose_read_size()
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        self.recv_messages.pause, self.recv_messages.resume = partial(self._hold, "queue"), partial(self._release, "queue")
        self._turns.open(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._turns.opened(self)
        self._stop_waiting()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a client that does not read as long as one that answers no ping: a ping could not be sent to it either."""
        super().pause_writing()
        if self.ping_timeout is not None:
            self._unread = self.loop.call_later(self.ping_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_waiting()
        super().resume_writing()

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        """Parse what was read, and stop reading if that was too much."""
        began = time.thread_time()
        super().data_received(data)
        self.spend(PER_READ_S + 2 * (time.thread_time() - began))  # what was parsed has to be put together, too
        self._choose_read_size()
        if self._account.in_debt:
            self._stand_in_line()

    def process_event(self, event: Any) -> None:
        """Count pings, each of which is answered by a pong."""
        if isinstance(event, Frame) and event.opcode is Opcode.PING:
            now = time.monotonic()
            if now - self._since > 1:
                self._pings, self._since = 0, now
            self._pings += 1
            if self._pings > PINGS_PER_S:
                self.transport.abort()
                return
        super().process_event(event)

    def _choose_read_size(self) -> None:
        self.transport.max_size = _PACED_BYTES if self._account.paced else _READ_BYTES  # type: ignore[attr-defined]

    def _hold(self, why: str) -> None:
        self._held.add(why)
        self.transport.pause_reading()

    def _release(self, why: str) -> None:
        self._held.discard(why)
        if not self._held:
            self.transport.resume_reading()
