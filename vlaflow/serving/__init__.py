"""Policies behind a socket: openpi's websocket protocol, strictly decoded, inference off the event loop."""
