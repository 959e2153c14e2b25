"""Everything that runs on the robot's computer: the client, the wire format and the real-time controller.

These modules do not import torch; they need numpy, msgpack and websockets. The server is in ``serving``.

>>> from vlaflow.robot import BackgroundTransport, Client, RealtimeConfig, RealtimeController

These names are imported when they are first used, so the controller works without websockets.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlaflow.robot.client import Client
    from vlaflow.robot.realtime import Move, RealtimeConfig, RealtimeController
    from vlaflow.robot.transports import BackgroundTransport

__all__ = ["BackgroundTransport", "Client", "Move", "RealtimeConfig", "RealtimeController"]

_MODULES = {"BackgroundTransport": "transports", "Client": "client"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'realtime')}"), name)
