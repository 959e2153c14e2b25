"""How large a message and its images may be, and what is logged when the system has no room for connections.

What a message may contain is limited by its codec (``robot/wire.py``), how much of the event loop's time a client gets by
``turns``, how many clients and requests there may be by the server and its engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from vlaflow.robot import wire

logger = logging.getLogger("vlaflow.serving")
SIDES = 4
PIXELS = 1920 * 1080
_LARGEST_PIXEL = 3 * 4
"""Bytes of a pixel whose channels are float32."""
_REST_BYTES = 2**20
"""Room for everything in a message but its images."""
_QUIET_S = 60.0


def most_pixels(side: int | None) -> int:
    """The largest image that is accepted: that of a full-HD camera, or ``SIDES`` times the side that the policy reads.

    A larger one would have to be resized, which would delay all clients.

    Args:
        side: at which the policy reads the view, in pixels; None for any.
    """
    return max(PIXELS, (SIDES * (side or 0)) ** 2)


def most_message_bytes(sides: Mapping[str, int | None]) -> int:
    """The largest message that a client of this policy needs: an image of ``most_pixels`` as float32 for every view.

    Args:
        sides: side in pixels at which the policy reads each view; None for any.
    """
    return min(wire.MOST_BYTES, _REST_BYTES + _LARGEST_PIXEL * sum(map(most_pixels, sides.values())))


def quiet_without_sockets(loop: asyncio.AbstractEventLoop) -> None:
    """Log once a minute that the system has no descriptor left for a connection; asyncio logs it a hundred times a second."""
    logged = -_QUIET_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged
        if "accept() out of system resource" not in str(context.get("message")):
            loop.default_exception_handler(context)
        elif time.monotonic() - logged >= _QUIET_S:
            logged = time.monotonic()
            logger.warning("Clients cannot connect (%s); those that are connected are served.", context.get("exception"))

    loop.set_exception_handler(handle)
