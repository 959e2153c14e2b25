"""What one client may cost the event loop: pings, large images, and connections that the system has no room for.

What a message may contain is limited by its codec (``robot/wire.py``), how many clients and requests there may be by the server
and its engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode

from vlaflow.errors import RequestError
from vlaflow.spec import Observation

logger = logging.getLogger("vlaflow.serving")
PINGS_PER_S = 20
SIDES = 4
PIXELS = 1920 * 1080
_QUIET_S = 60.0


class LimitedConnection(ServerConnection):
    """A connection that is dropped when its client sends more than ``PINGS_PER_S`` pings within a second."""

    _pings, _since = 0, 0.0

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


def require_sizes(observation: Observation, sides: Mapping[str, int | None]) -> None:
    """Refuse images far larger than the policy reads, because resizing one would delay all clients.

    Allowed are images of a full-HD camera, and ``SIDES`` times the side that the policy reads.

    Args:
        observation: of a request.
        sides: side in pixels at which the policy reads each view; None for any.

    Raises:
        RequestError: naming the view and both sizes.
    """
    for view, image in observation.images.items():
        side = sides.get(view) or 0
        height, width = image.shape[:2]
        if height * width > max(PIXELS, (SIDES * side) ** 2):
            read = f"{side} × {side}" if side else "smaller images"
            raise RequestError(
                f"The image of view '{view}' has {width} × {height} pixels, but the policy reads {read}. Send at most "
                "1920 × 1080."
            )


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
