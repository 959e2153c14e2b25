"""``from vlaflow.client import Client``: what a robot's computer needs; without torch."""

from vlaflow.serving.client import Client

__all__ = ["Client"]
