"""How large a message and its images may be.

What a message may contain is limited by its codec (``robot/wire.py``), how much of the event loop's time a client gets by
``turns``, how many clients may connect by ``listener`` and ``places``, how many requests there may be by the engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlaflow.robot import wire

SIDES = 4
PIXELS = 1920 * 1080
_LARGEST_PIXEL = 3 * 4
"""Bytes of a pixel whose channels are float32."""
_REST_BYTES = 2**20
"""Room for everything in a message but its images."""


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
