"""Which proxy leads to a server: none to this machine, otherwise the environment's (http_proxy, no_proxy, ...), if any."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SCHEMES = {"ws": ("ws", "socks", "https", "http", "all"), "wss": ("wss", "socks", "https", "all")}
"""Proxies by scheme of the address, preferred ones first. A websocket is a tunnel, so HTTPS's comes before HTTP's."""


def proxy_of(address: str) -> str | None:
    """The proxy for an address such as "ws://HOST:PORT"; None for a direct connection."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    known = getproxies()
    return next((known[scheme] for scheme in SCHEMES.get(parts.scheme, ()) if scheme in known), None)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by name or by number."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def without_password(proxy: str) -> str:
    """A proxy for an error message, without user name and password."""
    scheme, _, rest = proxy.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
