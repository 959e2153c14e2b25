"""The policy server: openpi's websocket protocol, strictly decoded, with inference off the event loop."""
