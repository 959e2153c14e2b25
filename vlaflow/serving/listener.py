"""The socket that a server listens on: how many clients may connect within a second, and what is logged when they cannot.

A connection takes about a millisecond of the event loop before its client can be charged for anything (``turns``). So a server
that accepts as fast as clients connect has no time for those it has.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vlaflow.serving")
AT_ONCE = 16
"""Connections that are accepted before the event loop turns to those that it has."""
BURST = 128
"""Connections that are accepted after a time without any, for the clients of a server that is restarted."""
PER_S = 50
"""Connections that are accepted per second from then on."""
_WAITING = 128
"""Connections that wait in the system's queue. The first is accepted first, so a flood cannot keep others out for ever."""
_QUIET_S = 60.0


class Budget:
    """What may be accepted: ``BURST`` connections at once, ``PER_S`` per second in the long run.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._left, self._at = clock, float(BURST), clock()

    @property
    def spent(self) -> bool:
        """Whether nothing is left for now."""
        now = self._clock()
        self._left, self._at = min(self._left + PER_S * (now - self._at), BURST), now
        return self._left < 1

    def spend(self) -> None:
        """Count a connection."""
        self._left -= 1


class Listener(socket.socket):
    """A listening socket that accepts as many connections as its ``Budget`` has.

    The others wait. asyncio cannot be asked to pause; but when the system lacks resources for a connection, it accepts none
    for a second, so that is what this socket reports.

    Args:
        host, port: address; of a host with several, one of IPv4 if there is any.

    Raises:
        OSError: the address is unknown or in use.
    """

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        super().__init__(family, kind, protocol)
        self._budget, self._pausing = Budget(), False
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
        except OSError:
            self.close()
            raise

    def listen(self, backlog: int = _WAITING) -> None:
        """Listen; asyncio's ``backlog`` is also the number of connections that it accepts at once, so more may wait."""
        super().listen(max(backlog, _WAITING))

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: there is none.
            OSError: too many were accepted lately.
        """
        if self._pausing:  # asyncio of Python 3.11 and 3.12 goes on after an error
            self._pausing = False
            raise BlockingIOError
        if self._budget.spent:
            self._pausing = True
            raise OSError(errno.ENOBUFS, f"more than {PER_S} a second try")
        accepted = super().accept()
        self._budget.spend()
        return accepted


def log_pauses(loop: asyncio.AbstractEventLoop) -> None:
    """Log once a minute that clients cannot connect; asyncio logs it at every pause, before Python 3.13 more than once."""
    logged = -_QUIET_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged
        message, error = str(context.get("message")), context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in message:
            return  # the socket was closed during a pause, after which asyncio wants to accept again
        if "accept() out of system resource" not in message:
            loop.default_exception_handler(context)
        elif time.monotonic() - logged >= _QUIET_S:
            logged = time.monotonic()
            why = error.strerror if isinstance(error, OSError) else error
            logger.warning("Clients cannot connect now (%s); those that are connected are served.", why)

    loop.set_exception_handler(handle)
