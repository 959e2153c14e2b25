"""``from vlaflow.client import Client, RealtimeController``: what a robot's computer needs; without torch."""

from vlaflow.serving.client import Client
from vlaflow.serving.lines import BackgroundLine
from vlaflow.serving.realtime import Move, RealtimeConfig, RealtimeController

__all__ = ["BackgroundLine", "Client", "Move", "RealtimeConfig", "RealtimeController"]
